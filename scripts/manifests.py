"""Check the manifests: ``make manifests``.

    python -m scripts.manifests                     render everything, check it, print a table
    python -m scripts.manifests --release production        the same, and nothing may hide behind a tag
    python -m scripts.manifests --render production         print what is checked, and only if it passes

Each overlay, what Argo CD follows, and each component that none of them has, is rendered by a pinned kubectl; core
kinds are checked strictly by kubernetes-validate, custom kinds against the CRDs in ``AVRT_CRD_DIR`` (several folders:
as in PATH) or the validators of @kubernetes-models; then come our own policies and checkov. The tools are installed
below build/.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from rich.console import Console
from rich.table import Table

from scripts.manifest_policies import CORE_GROUPS, Build, Object, group, images_are_pinned, problems, title

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = ROOT / "manifests"
TOOLS = ROOT / "build" / "tools"
SCHEMAS = ROOT / "build" / "manifest-schemas"
RENDERED = ROOT / "build" / "manifests"
KUBERNETES = "1.35"
#: Rendered by themselves, since nothing has them: component -> what it changes, and the components beside it.
LOOSE_COMPONENTS = {
    "external-s3": ("base", "external-secrets"),
    "autoscaling-hpa": ("models/avrt-3b",),
    "model-cache": ("models/avrt-3b", "autoscaling-none"),
    "modelcar": ("models/avrt-3b", "autoscaling-none"),
    "llm-inference-service": ("models/avrt-3b",),
}
#: Objects of Kubeflow, KServe and Argo CD, with nothing but the fields that change.
PARTIAL_COMPONENTS = ("argocd-admin", "kfp-admin", "kfp-artifacts", "kserve-admin")

#: checkov's checks that we do not follow, and why.
SKIPPED_CHECKS = {
    "CKV_K8S_11": "no CPU limits: throttled servers are slow without any gain; requests share the node out",
    "CKV_K8S_15": "IfNotPresent: images are pinned by content, and a node without a registry must work",
    "CKV_K8S_35": "secrets in the environment: the programs take them from nowhere else",
    "CKV_K8S_40": "no fixed user id: OpenShift gives one; the images' own is 65532",
    "CKV_K8S_43": "digests are checked where they matter, by --release",
    "CKV_K8S_38": "only the two Jobs that talk to the API server have a token",
}

_VALIDATE = """
import json, sys
from kubernetes_validate import SchemaNotFoundError, ValidationError, validate
answers = []
for document in json.load(sys.stdin):
    try:
        validate(document, sys.argv[1], strict=True)
        answers.append(None)
    except ValidationError as error:
        answers.append(".".join(map(str, error.path)) + ": " + error.message)
    except SchemaNotFoundError as error:
        answers.append(error.message)
print(json.dumps(answers))
"""


class Unmet(Exception):
    """Something that the machine lacks, or that cannot be rendered."""


def install_tools() -> None:
    """Bring build/tools to requirements/tools.lock."""
    lock = ROOT / "requirements" / "tools.lock"
    if _fresh(TOOLS, lock):
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    uv = [sys.executable, "-m", "uv"]
    _run([*uv, "venv", "--quiet", "--python", sys.executable, str(TOOLS)])
    _run([*uv, "pip", "install", "--quiet", "--python", str(TOOLS / "bin" / "python"), "-r", str(lock)])
    _stamp(TOOLS, lock)


def install_schemas() -> bool:
    """Bring build/manifest-schemas to its lock; False where there is no Node.js."""
    source = ROOT / "requirements" / "manifest-schemas"
    lock = source / "package-lock.json"
    if shutil.which("npm") is None or shutil.which("node") is None:
        return False
    if not _fresh(SCHEMAS, lock):
        shutil.rmtree(SCHEMAS, ignore_errors=True)
        SCHEMAS.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(source / name, SCHEMAS / name)
        _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=SCHEMAS)
        _stamp(SCHEMAS, lock)
    return True


def _fresh(folder: Path, lock: Path) -> bool:
    stamp = folder / "stamp"
    return stamp.exists() and stamp.read_text(encoding="utf-8") == _digest(lock)


def _stamp(folder: Path, lock: Path) -> None:
    (folder / "stamp").write_text(_digest(lock), encoding="utf-8")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: list[str], *, cwd: Path = ROOT, stdin: str | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise Unmet(f"{' '.join(command[:4])} … failed: {(result.stderr or result.stdout).strip()[-2000:]}")
    return result.stdout


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization.

    Raises:
        Unmet: the message is kustomize's.
    """
    return [d for d in yaml.safe_load_all(_run([str(TOOLS / "bin" / "kubectl"), "kustomize", str(folder)])) if d]


def builds(names: Iterable[str] = ()) -> Iterator[Build]:
    """Every overlay, every component that stands alone, and the others on the base; or those that are named.

    Raises:
        Unmet: where a name is unknown, or something cannot be rendered.
    """
    found: dict[str, tuple[Path, str | None]] = {}
    for folder in sorted((MANIFESTS / "overlays").iterdir()):
        found[folder.name] = (folder, None)
    for folder in sorted((MANIFESTS / "serving").iterdir()):
        found[f"serving/{folder.name}"] = (folder, folder.name)
    for environment in ("staging", "production"):
        bootstrap = f"argocd/bootstrap/{environment}"
        found[bootstrap] = (MANIFESTS / bootstrap, None)
        found[f"argocd/applications/{environment}"] = (MANIFESTS / f"argocd/applications/{environment}", bootstrap)
    for folder in sorted((MANIFESTS / "components").iterdir()):
        kind = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))["kind"]
        if kind == "Kustomization":
            found[f"components/{folder.name}"] = (folder, None)
        elif folder.name in LOOSE_COMPONENTS:
            changed = LOOSE_COMPONENTS[folder.name][0]
            found[f"components/{folder.name}"] = (_alone(folder.name), None if changed == "base" else "staging")
    if unknown := set(names) - found.keys():
        raise Unmet(f"There is no {', '.join(sorted(unknown))}; there are {', '.join(found)}.")
    render_once = functools.cache(render)
    for name in names or found:
        folder, beside = found[name]
        partial = name.removeprefix("components/") in PARTIAL_COMPONENTS
        around = render_once(found[beside][0]) if beside else []
        yield Build(name, render_once(folder), partial, around)


def _alone(component: str) -> Path:
    folder = RENDERED / f"with-{component}"
    changed, *beside = LOOSE_COMPONENTS[component]
    if changed != "base":
        # As after a promotion.
        patch = [
            {"op": "add", "path": "/metadata/annotations/avrt~1model-version", "value": "1"},
            {"op": "remove", "path": "/metadata/annotations/serving.kserve.io~1stop"},
        ]
        patches = [{"target": {"kind": "InferenceService"}, "patch": yaml.safe_dump(patch)}]
        _write_kustomization(folder / "promoted", changed, [], patches=patches)
    images = [{"name": f"avrt/{name}", "newTag": "0.1.0"} for name in ("pipeline", "vllm")]
    _write_kustomization(folder, changed if changed == "base" else None, [*beside, component], images=images)
    return folder


def _write_kustomization(folder: Path, resource: str | None, components: list[str], **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    up = os.path.relpath(MANIFESTS, folder)
    document = {
        "resources": [f"{up}/{resource}" if resource else "promoted"],
        "components": [f"{up}/components/{name}" for name in components],
        **more,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")


def core_problems(build: Build) -> list[str]:
    """What kubernetes-validate has against the core kinds."""
    documents = [copy.deepcopy(d) for d in build.objects if group(d) in CORE_GROUPS]
    if build.partial:
        for document in documents:
            if document["kind"] == "Deployment":  # the live object has the rest
                document["spec"].setdefault("selector", {"matchLabels": {}})
    answers = json.loads(
        _run([str(TOOLS / "bin" / "python"), "-c", _VALIDATE, KUBERNETES], stdin=json.dumps(documents))
    )
    return [f"{title(d)}: {answer}" for d, answer in zip(documents, answers, strict=True) if answer]


def definitions(kinds: Iterable[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """OpenAPI schemas of custom resources by (apiVersion, kind), from the files in ``AVRT_CRD_DIR``.

    Args:
        kinds: only these are looked for; the files are large.
    """
    default = ROOT.parent / "shared" / "crds"
    folders = os.environ.get("AVRT_CRD_DIR", str(default) if default.is_dir() else "")
    found = {}
    for folder in filter(None, folders.split(os.pathsep)):
        for path in sorted(Path(folder).glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            if not any(f"kind: {kind}\n" in text for kind in kinds):
                continue
            for document in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
                if document and document.get("kind") == "CustomResourceDefinition":
                    spec = document["spec"]
                    for version in spec["versions"]:
                        key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                        found[key] = version["schema"]["openAPIV3Schema"]
    return found


def custom_kinds(rendered: Iterable[Build]) -> set[str]:
    """The kinds that need a definition."""
    return {d["kind"] for build in rendered for d in build.objects if group(d) not in CORE_GROUPS}


def strict(schema: Any, *, partial: bool) -> Any:
    """A structural schema as JSON schema that refuses unknown fields; without ``required`` for partial objects."""
    if isinstance(schema, list):
        return [strict(item, partial=partial) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            result[key] = {name: strict(child, partial=partial) for name, child in value.items()}
        elif key == "required" and partial:
            continue
        elif key in ("items", "additionalProperties", "allOf", "anyOf", "oneOf", "not"):
            result[key] = strict(value, partial=partial)
        else:
            result[key] = value
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        result["type"] = [schema["type"], "null"]
    closed = "properties" in schema and "additionalProperties" not in schema
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    return result


def custom_problems(
    build: Build, known: dict[tuple[str, str], dict[str, Any]], *, node: bool
) -> tuple[list[str], list[str]]:
    """What the schemas have against the custom kinds, and the kinds for which there is no schema."""
    wrong: list[str] = []
    unchecked: list[str] = []
    left = []
    for document in (d for d in build.objects if group(d) not in CORE_GROUPS):
        schema = known.get((document["apiVersion"], document["kind"]))
        if schema is None:
            left.append(document)
            continue
        open_metadata = {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
        validator = Draft202012Validator(strict(open_metadata, partial=build.partial))
        for error in validator.iter_errors(document):
            wrong.append(f"{title(document)}: {'.'.join(map(str, error.path))}: {error.message}")
    answers: list[dict[str, Any]] = [{"problems": None} for _ in left]
    if left and node:
        script = str(ROOT / "scripts" / "manifest_schemas.mjs")
        answers = json.loads(_run(["node", script, str(SCHEMAS)], stdin=json.dumps(left)))
    for document, answer in zip(left, answers, strict=True):
        if answer["problems"] is None:
            unchecked.append(f"{document['kind']} ({document['apiVersion']})")
        else:
            wrong += [f"{title(document)}: {problem}" for problem in answer["problems"]]
    return wrong, sorted(set(unchecked))


def checkov_problems(rendered: list[Build]) -> dict[str, list[str]]:
    """What checkov has against each build."""
    with tempfile.TemporaryDirectory() as folder:
        for build in rendered:
            text = yaml.safe_dump_all(build.objects, sort_keys=False)
            (Path(folder) / f"{build.name.replace('/', '--')}.yaml").write_text(text, encoding="utf-8")
        command = [str(TOOLS / "bin" / "checkov"), "--directory", folder, "--framework", "kubernetes"]
        command += ["--skip-download", "--quiet", "--compact", "--soft-fail", "--output", "json"]
        command += ["--skip-check", ",".join(SKIPPED_CHECKS)]
        report = json.loads(_run(command))
    found: dict[str, list[str]] = {build.name: [] for build in rendered}
    if report.get("passed") == 0 and "results" not in report:
        raise Unmet("checkov found nothing to check.")
    for failure in report["results"]["failed_checks"]:
        name = Path(failure["file_path"]).stem.replace("--", "/")
        found[name].append(f"{failure['resource']}: {failure['check_id']} {failure['check_name']}")
    return found


def check(rendered: list[Build], *, release: bool) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """Everything that is wrong, by build and check, and notes on what could not be checked or is not pinned."""
    node = install_schemas()
    known = definitions(custom_kinds(rendered))
    notes = []
    results: dict[str, dict[str, list[str]]] = {}
    for build in rendered:
        wrong, unchecked = custom_problems(build, known, node=node)
        results[build.name] = {"core kinds": core_problems(build), "custom kinds": wrong, **problems(build)}
        notes += [f"{build.name}: no schema for {kind} (AVRT_CRD_DIR, or Node.js for npm's)" for kind in unchecked]
        unpinned = [] if build.partial else list(images_are_pinned(build))
        if release:
            results[build.name]["pinned"] = unpinned
        elif build.name == "production":
            notes += [f"production: {problem}; --release refuses it until then" for problem in unpinned]
    whole = [build for build in rendered if not build.partial]
    for name, wrong in (checkov_problems(whole) if whole else {}).items():
        results[name]["checkov"] = wrong
    return results, notes


def table(rendered: list[Build], results: dict[str, dict[str, list[str]]]) -> Table:
    """One line a build: objects, and each check's verdict."""
    result = Table(title="manifests", title_justify="left")
    for column in ("build", "objects", "checks", "problems"):
        result.add_column(column, justify="left" if column == "build" else "right")
    for build in rendered:
        wrong = sum(len(found) for found in results[build.name].values())
        result.add_row(build.name, str(len(build.objects)), str(len(results[build.name])), str(wrong or "–"))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Check, print, and return 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m scripts.manifests", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="overlays, or components/NAME; all by default")
    parser.add_argument("--release", action="store_true", help="refuse images that are not pinned")
    parser.add_argument("--render", metavar="OVERLAY", help="print one overlay, as checked with --release")
    options = parser.parse_args(arguments)
    names = [options.render] if options.render else options.names
    console = Console(stderr=bool(options.render))
    try:
        install_tools()
        rendered = list(builds(names))
        results, notes = check(rendered, release=options.release or bool(options.render))
    except Unmet as problem:
        print(problem, file=sys.stderr)
        return 1
    console.print(table(rendered, results))
    wrong = [
        f"{b}: {c}: {problem}" for b, checks in results.items() for c, found in checks.items() for problem in found
    ]
    for line in [*notes, *wrong]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{sum(map(len, results.values()))} checks of {len(rendered)} builds, {len(wrong)} problems")
    if options.render and not wrong:
        print(yaml.safe_dump_all(rendered[0].objects, sort_keys=False), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
