"""GitOps: promotion as a commit that carries the evidence, in the repository that the cluster follows."""

from __future__ import annotations

import logging
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from avrt_lib import tracking
from avrt_lib.config import Config
from avrt_lib.errors import ServingError, UsageError
from avrt_lib.promotion import manifest as isvc
from avrt_lib.serving.forges import open_pull_request
from avrt_lib.serving.git import Repository, TryAgain
from avrt_lib.serving.inference_service import STOP

log = logging.getLogger("avrt.serving")

_PATIENCE_S = 300.0
_LONGEST_WAIT_S = 4.0
MANIFEST_FILE = "inferenceservice.yaml"
#: Not JSON: Argo CD takes every JSON file of a plain folder for an object of the cluster.
EVIDENCE_FILE = "evidence.md"


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a promotion in the repository.

    Attributes:
        commit: the commit that holds the champion's manifest.
        pull_request: its address, where others are to merge the commit.
    """

    commit: str
    pull_request: str | None = None

    def __str__(self) -> str:
        return self.commit if self.pull_request is None else f"{self.commit} (to be merged: {self.pull_request})"


def commit_manifest(config: Config, manifest: Path, decision: dict[str, Any]) -> Change:
    """Put the champion's manifest and its evidence into the repository, by a push or a pull request.

    Whatever others push meanwhile is taken in, and the commit made anew on top of it. Where the branch holds the same
    model with the same settings already, nothing is committed, and an open pull request is found again: a promotion
    that was killed, wherever it was, goes on by being called again. The model's version in the registry gets the commit
    as a tag.

    Args:
        config: ``deployment.manifests_url``, ``…_branch``, ``…_path`` and ``deployment.git``; the files go to
            ``PATH/MODEL_NAME/inferenceservice.yaml`` and ``evidence.md``.
        manifest: the InferenceService.
        decision: promotion's; its test goes into the commit message and the evidence.

    Raises:
        ConfigError: where the variable that should hold the token is not set.
        EnvironmentProblem: where git is not installed.
        ServingError: where the repository or the forge refuses, or holds a newer version of the model; the message has
            the reason and the mend.
    """
    if not config.deployment.manifests_url:
        raise UsageError("deployment.manifests_url is not set: name the repository that the cluster follows.")
    promotion = Promotion(config, manifest.read_text(encoding="utf-8"), decision)
    with tempfile.TemporaryDirectory(prefix="avrt-git-") as temporary:
        repository = Repository(Path(temporary), config.deployment)
        commit, landed = _settled(repository, config, promotion)
        message = repository.message(commit)
    address = None
    if not landed:
        title, _, body = message.partition("\n\n")
        address = open_pull_request(config.deployment, promotion.branch, title, body)
    change = Change(commit, address)
    log.info("%s is in %s at %s", promotion.subject, repository.shown(repository.url), change)
    tags = {"commit": commit, "inference_service": promotion.service, "pull_request": address}
    tracking.tag_version(promotion.name, decision["version"], {key: value for key, value in tags.items() if value})
    return change


class Promotion:
    """One model's promotion: what its commit holds, and how it stands to the manifest that is in the branch.

    ``before`` is that manifest, or None where there is none.
    """

    def __init__(self, config: Config, manifest: str, decision: dict[str, Any]) -> None:
        self.name = config.promotion.model_name
        self.service = f"{config.deployment.namespace}/{self.name}"
        self._config = config
        self._decision = decision
        self._manifest = manifest
        self._document = _parsed(manifest) or {}
        self._version: int | None = decision["version"]
        folder = PurePosixPath(config.deployment.manifests_path) / self.name
        self.manifest_path = str(folder / MANIFEST_FILE)
        self._evidence_path = str(folder / EVIDENCE_FILE)

    @property
    def subject(self) -> str:
        """The commit's first line, which no other model's commit begins with."""
        version = "" if self._version is None else f" version {self._version}"
        return f"Promote {self.name}{version}: {self._decision['sha256'][:12]}"

    @property
    def branch(self) -> str:
        """The branch of a pull request; the same model has the same one."""
        version = "" if self._version is None else f"-v{self._version}"
        return f"promote-{self.name}{version}-{self._decision['sha256'][:12]}"

    def is_in(self, before: str | None) -> bool:
        """Whether the branch holds this model with these settings.

        The run and the data that it came from do not count: for them the same model would be rolled out once more.
        """
        held = _parsed(before)
        return held is not None and _without_origin(held) == _without_origin(self._document)

    def check_newer(self, before: str | None) -> None:
        """Check that no newer version is replaced.

        Raises:
            ServingError: where the branch holds a newer version, or one that cannot be compared.
        """
        held = _parsed(before) or {}
        version = _version(held)
        if version is None or _annotations(held).get(isvc.MODEL_SHA256) == self._decision["sha256"]:
            return
        restart = f"remove {self.manifest_path} there to begin anew"
        if self._version is None:
            raise ServingError(
                f"{self.name} is not registered, but the branch holds its version {version}, so nobody can say which "
                f"is newer: set MLFLOW_TRACKING_URI for the promotion, or {restart}."
            )
        if version > self._version:
            raise ServingError(
                f"The branch holds version {version} of {self.name}, so version {self._version} is not promoted any "
                f"more: to go back to it, revert what came later ({self._evidence_path} has the command)."
            )
        if version == self._version:
            raise ServingError(
                f"The branch holds another model as version {version} of {self.name}, one from another registry: set "
                f"deployment.manifests_path to a folder of this registry's own, or {restart}."
            )

    def files(self, before: str | None) -> dict[str, str]:
        """Text by path."""
        facts = "\n".join(f"- {key}: `{value}`" for key, value in self._facts().items())
        evidence = f"# {self.subject}\n\n{self._story(before)}\n\n{facts}\n"
        return {self.manifest_path: self._manifest, self._evidence_path: evidence}

    def message(self, before: str | None) -> str:
        """The commit message: what is promoted, why, how to take it back, and as trailers what it points at."""
        trailers = "\n".join(f"{key}: {value}" for key, value in self._facts().items())
        return f"{self.subject}\n\n{self._story(before)}\n\n{trailers}\n"

    def _facts(self) -> dict[str, Any]:
        origin = _annotations(self._document)
        found = {
            "Avrt-Run": origin.get(isvc.RUN),
            "Avrt-Model-Version": None if self._version is None else f"{self.name}/{self._version}",
            "Avrt-Model-Uri": self._decision["uri"],
            "Avrt-Model-Sha256": self._decision["sha256"],
            "Avrt-Data-Hash": origin.get(isvc.DATA),
            "Avrt-Config-Hash": self._config.sha256,
            "Avrt-Inference-Service": self.service,
        }
        return {key: value for key, value in found.items() if value}

    def _story(self, before: str | None) -> str:
        test, held = self._decision["test"], _parsed(before)
        if held is None or _annotations(held).get(STOP) == "true":
            effect = f"This takes {self.name} off the cluster, since it had no model before."
        else:
            version = _version(held)
            former = "the model before" if version is None else f"version {version}"
            effect = f"This brings back {former} ({_model_uri(held)}); today's pods answer until its pods are ready."
        parts = (
            self._decision["reason"],
            evaluation_table(self._decision),
            f"Exact McNemar test against the base on {test['n']} questions: {test['wins']} won, {test['losses']} lost, "
            f"p = {test['p_value']:.3g}.",
            f"Rollback, then push:\n\n    git revert --no-edit ':/^{self.subject}'",
            effect,
        )
        return "\n\n".join(parts)


def evaluation_table(decision: dict[str, Any]) -> str:
    """Accuracies of base and trained models on the validation questions, with Wilson's 95 % intervals, as Markdown."""
    from avrt_lib.evaluation.statistics import wilson_interval

    n = decision["test"]["n"]
    rows = ["| model | validation accuracy | 95 % interval |", "|---|---|---|"]
    for name, accuracy in decision["validation_accuracy"].items():
        low, high = wilson_interval(round(accuracy * n), n)
        shown = f"**{name}**" if name == decision["model"] else name
        rows.append(f"| {shown} | {accuracy:.1%} | {low:.1%} – {high:.1%} |")
    return "\n".join(rows)


def _settled(repository: Repository, config: Config, promotion: Promotion) -> tuple[str, bool]:
    started, wait_s = time.monotonic(), 0.1
    while True:
        try:
            return _put(repository, config, promotion)
        except TryAgain as problem:
            if time.monotonic() - started > _PATIENCE_S:
                raise
            log.warning("%s; trying again", problem)
            # Those who wait for the same branch must not come back all at once.
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(_LONGEST_WAIT_S, 2 * wait_s)


def _put(repository: Repository, config: Config, promotion: Promotion) -> tuple[str, bool]:
    """One attempt. Returns the commit that holds the promotion, and whether it is in the followed branch."""
    base = _base(repository, config)
    before = repository.read(base, promotion.manifest_path)
    if before is None:
        _check_folder(repository, config, base)
    if promotion.is_in(before):
        return repository.last_change(base, promotion.manifest_path), True
    promotion.check_newer(before)
    proposing = config.deployment.git.mode == "pull_request"
    target, tip = config.deployment.manifests_branch, None
    if proposing:
        target = promotion.branch
        tip = repository.fetch(target) if target in repository.branches() else ""
        if tip and _still_good(repository, promotion, base, tip):
            return tip, False
    commit = repository.commit(base, promotion.files(before), promotion.message(before))
    repository.push(commit, target, replacing=tip)
    return commit, not proposing


def _still_good(repository: Repository, promotion: Promotion, base: str, tip: str) -> bool:
    """Whether a branch that was pushed before holds this promotion, and nothing has changed below it since."""
    path = promotion.manifest_path
    return promotion.is_in(repository.read(tip, path)) and not repository.last_change(f"{tip}..{base}", path)


def _base(repository: Repository, config: Config) -> str:
    branch, url = config.deployment.manifests_branch, repository.shown(repository.url)
    try:
        return repository.fetch(branch)
    except TryAgain:
        raise
    except ServingError:
        branches = repository.branches()
        if branch in branches:
            raise
        if not branches:
            path = config.deployment.manifests_path
            raise ServingError(
                f"{url} is empty: push a first commit with the folder {path} to its branch {branch}."
            ) from None
        raise ServingError(
            f"{url} has no branch {branch} (it has {', '.join(sorted(branches)[:5])}): make it, or correct "
            "deployment.manifests_branch."
        ) from None


def _check_folder(repository: Repository, config: Config, base: str) -> None:
    path = str(PurePosixPath(config.deployment.manifests_path))
    if not repository.has_folder(base, path):
        raise ServingError(
            f"{repository.shown(repository.url)} has no folder {path} in its branch "
            f"{config.deployment.manifests_branch}, so the cluster cannot follow it: commit a file there, or correct "
            "deployment.manifests_path."
        )


def _parsed(text: str | None) -> dict[str, Any] | None:
    """The InferenceService of a manifest, which may have other objects beside it, or None where there is none."""
    try:
        documents = list(yaml.safe_load_all(text or ""))
    except yaml.YAMLError:
        return None
    services = (each for each in documents if isinstance(each, dict) and each.get("kind") == "InferenceService")
    return next(services, None)


def _annotations(document: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = (document.get("metadata") or {}).get("annotations") or {}
    return found


def _version(document: dict[str, Any]) -> int | None:
    text = str(_annotations(document).get(isvc.MODEL_VERSION, ""))
    return int(text) if text.isdecimal() else None


def _model_uri(document: dict[str, Any]) -> str | None:
    uri = document
    for key in ("spec", "predictor", "model", "storageUri"):
        uri = uri.get(key) or {}
    return str(uri) if uri else None


def _without_origin(document: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in _annotations(document).items() if key not in (isvc.RUN, isvc.DATA)}
    return {**document, "metadata": {**(document.get("metadata") or {}), "annotations": kept}}
