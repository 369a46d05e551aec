"""Git with somebody else's repository: nothing of it is run here, nobody is asked anything, no credential is shown.

There is no working tree: trees are read and written as git's objects, so that no link, filter or hook of the repository
gets to act on this machine.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from avrt_lib.config import DeploymentConfig
from avrt_lib.errors import ConfigError, EnvironmentProblem, ServingError
from avrt_lib.keys import header_key

_TIMEOUT_S = 120
_PROTOCOLS = "https:ssh:file"
_USERS = {"github": "x-access-token", "gitlab": "oauth2", "gitea": "oauth2", None: "oauth2"}
#: Where git is started by git (from a hook, say), these lead it to the outer repository.
_OUTER = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE")
_CONFLICT = re.compile(
    r"\[rejected\]|\[remote rejected\] \((cannot lock ref|failed to update ref|reference already exists|"
    r"incorrect old value)",
    re.IGNORECASE,
)
_PASSING = re.compile(
    r"early EOF|hung up unexpectedly|timed out|Connection reset|returned error: (429|50[0-4])|RPC failed", re.IGNORECASE
)
_URL_USER = re.compile(r"(?<=://)[^/@\s]+@")

#: What git says, and the mend. The first that fits counts.
_MENDS: tuple[tuple[str, str], ...] = (
    (
        r"load public key|load key|secret key|gpg failed|signing failed|user\.signingkey|ssh-keygen",
        "correct deployment.git.signing_key: the key must be there and usable without a passphrase",
    ),
    (
        r"verified signature|must be signed|unverified commit",
        "it takes signed commits alone: set deployment.git.signing and signing_key, and make the key known there",
    ),
    (
        r"protected|not allowed to push|hook declined|GH0\d\d",
        "the branch takes no pushes of this account: let it push, or set deployment.git.mode=pull_request",
    ),
    (
        r"Authentication failed|could not read (Username|Password)|returned error: 40[13]|Permission denied|"
        r"access denied|not authori[sz]ed",
        "the credentials are refused or missing: set deployment.git.token_env to the variable with a token that may "
        "write there, or give git an SSH key",
    ),
    (r"Host key verification failed", "add the host's key to known_hosts"),
    (r"certificate|SSL", "name the certificate authority in GIT_SSL_CAINFO"),
    (
        r"Could not resolve|unable to connect|Failed to connect|Connection refused|No route to host|timed out",
        "it cannot be reached: correct deployment.manifests_url, or the proxy",
    ),
    (r"transport '.*' not allowed", "deployment.manifests_url takes https, ssh and file"),
    (
        r"not found|does not exist|not appear to be a git repository|No such file|Could not read from remote",
        "correct deployment.manifests_url; a private repository also looks like this to an account without access",
    ),
)


class TryAgain(ServingError):
    """Somebody else's push was faster, or the connection broke: look at the branch again and do it anew."""


class Repository:
    """A bare, partial copy of the repository that the cluster follows, in an empty folder.

    Args:
        folder: gets the copy.
        config: address, token and signing.

    Raises:
        ConfigError: where the variable that should hold the token is empty, or holds none that can be sent.
        EnvironmentProblem: where git is not installed.
    """

    def __init__(self, folder: Path, config: DeploymentConfig) -> None:
        self.url = str(config.manifests_url)
        self._folder = folder
        self._blobs: dict[str, str] = {}
        self._token = ""
        # The copy is gone in a moment: it needs no tidying up.
        self._settings = [("core.hooksPath", os.devnull), ("gc.auto", "0"), ("maintenance.auto", "false")]
        # It would stand before what `git log` is asked for.
        self._settings.append(("log.showSignature", "false"))
        if config.git.token_env:
            self._token = header_key(os.environ.get(config.git.token_env, ""), config.git.token_env)
            if not self._token:
                raise ConfigError(
                    f"The environment variable {config.git.token_env} (deployment.git.token_env) is not set: put the "
                    "token of the repository's host in it."
                )
            address = urlsplit(self.url)
            if address.scheme == "https":
                # The token stays in the environment: it is on no command line, goes to no other host, and no other
                # helper gets to keep it.
                helper = f"credential.https://{address.netloc}.helper"
                user, variable = _USERS[config.git.forge], config.git.token_env
                answer = f'!f() {{ echo "username={user}"; echo "password=${variable}"; }}; f'
                self._settings += [(helper, ""), (helper, answer)]
        self.run("init", "--quiet", "--bare", "--template=", ".")
        self.run("remote", "add", "origin", self.url)
        self._signing = self._sign(config)

    def fetch(self, branch: str) -> str:
        """Fetch a branch, and return its newest commit.

        Raises:
            ServingError: where it is not there or cannot be read.
        """
        wanted = f"+refs/heads/{branch}:refs/remotes/origin/{branch}"
        # Of a large repository only the folders' listings come; files come when they are read.
        self.run("fetch", "--quiet", "--no-tags", "--no-recurse-submodules", "--filter=blob:none", "origin", wanted)
        return self.run("rev-parse", f"refs/remotes/origin/{branch}")

    def branches(self) -> dict[str, str]:
        """The branches of the remote repository with their newest commits.

        Raises:
            ServingError: where it cannot be read.
        """
        lines = self.run("ls-remote", "--heads", "origin").splitlines()
        return {name.removeprefix("refs/heads/"): commit for commit, name in (line.split("\t") for line in lines)}

    def read(self, commit: str, path: str) -> str | None:
        """A file's text, or None where a commit has no such file."""
        found = self.run("ls-tree", commit, "--", path).split()
        return self.run("cat-file", "blob", found[2]) if len(found) > 2 and found[1] == "blob" else None

    def has_folder(self, commit: str, path: str) -> bool:
        """Whether a commit has a folder; "." is always there."""
        return path == "." or self.run("ls-tree", commit, "--", path).split()[1:2] == ["tree"]

    def message(self, commit: str) -> str:
        """A commit's message."""
        return self.run("log", "-1", "--format=%B", commit)

    def last_change(self, commits: str, path: str) -> str:
        """The newest of some commits that changed a path, or nothing."""
        return self.run("log", "-1", "--format=%H", commits, "--", path)

    def commit(self, parent: str, files: dict[str, str], message: str) -> str:
        """Make a commit on top of another one; no branch is moved.

        Args:
            parent: the commit before.
            files: text by path; other files stay as they are.
            message: the commit's message.

        Raises:
            ServingError: where it cannot be signed, or a file stands where a folder is needed.
        """
        entries = [
            part for path, text in files.items() for part in ("--cacheinfo", f"100644,{self._blob(text)},{path}")
        ]
        self.run("read-tree", parent)
        self.run("update-index", "--add", *entries)
        tree = self.run("write-tree", "--missing-ok")
        return self.run("commit-tree", *self._signing, "-p", parent, "-F", "-", tree, given=message)

    def push(self, commit: str, branch: str, *, replacing: str | None = None) -> None:
        """Move a branch of the remote repository to a commit.

        Args:
            commit: what is pushed.
            branch: where to.
            replacing: None pushes only what follows on the branch. Otherwise the branch is set to the commit if it
                still is at this one (empty: if it is not there yet).

        Raises:
            TryAgain: where the branch has moved meanwhile, or the connection broke.
            ServingError: where the push is refused; the message has the reason and the mend.
        """
        lease = [] if replacing is None else [f"--force-with-lease=refs/heads/{branch}:{replacing}"]
        self.run("push", "--porcelain", *lease, "origin", f"{commit}:refs/heads/{branch}")

    def run(self, *arguments: str, given: str | None = None) -> str:
        """Run git in the copy, and return what it prints.

        Raises:
            TryAgain, ServingError: as ``push``.
        """
        settings = [part for name, value in self._settings for part in ("-c", f"{name}={value}")]
        environment = {name: value for name, value in os.environ.items() if name not in _OUTER}
        environment |= {"GIT_ALLOW_PROTOCOL": _PROTOCOLS, "GIT_LITERAL_PATHSPECS": "1", "LC_ALL": "C"}
        environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "SSH_ASKPASS_REQUIRE": "never"}
        try:
            # A session of its own: nothing that git starts can ask on the terminal, and all of it can be ended.
            process = subprocess.Popen(
                ["git", *settings, *arguments],
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise EnvironmentProblem("git is not installed: deployment.target=git needs it.") from error
        with process:
            try:
                output, errors = process.communicate(given, timeout=_TIMEOUT_S)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise TryAgain(f"git {arguments[0]} did not end within {_TIMEOUT_S} s.") from error
                raise
        if process.returncode:
            # For a push, standard output has a line for each branch, and standard error what the other side says.
            raise self._problem(arguments[0], f"{errors}\n{output}" if arguments[0] == "push" else errors)
        return output.strip()

    def shown(self, text: str) -> str:
        """A text as one line without credentials."""
        hidden = text.replace(self._token, "***") if self._token else text
        return " ".join(_URL_USER.sub("***@", hidden).split())

    def _blob(self, text: str) -> str:
        """A text as git's object; kept, since a commit that is made anew must be quick to be in time."""
        if text not in self._blobs:
            self._blobs[text] = self.run("hash-object", "-w", "--stdin", given=text)
        return self._blobs[text]

    def _problem(self, verb: str, said: str) -> ServingError:
        line = self.shown(said)[-400:]
        if verb == "push" and _CONFLICT.search(said):
            return TryAgain(f"{self.shown(self.url)} takes in other pushes all the time: {line}")
        reason = said.replace(self.url, "")
        mend = next((mend for pattern, mend in _MENDS if re.search(pattern, reason, re.IGNORECASE)), None)
        kind = TryAgain if _PASSING.search(said) else ServingError
        return kind(f"git {verb} failed for {self.shown(self.url)}: {line}{f' — {mend}' if mend else ''}.")

    def _sign(self, config: DeploymentConfig) -> list[str]:
        git = config.git
        if git.signing:
            self._settings.append(("gpg.format", "openpgp" if git.signing == "gpg" else "ssh"))
            if git.signing_key:
                self._settings.append(("user.signingKey", git.signing_key))
        for name, value in (("user.name", "avrt"), ("user.email", "avrt@localhost")):
            if not self.run("config", "--default=", "--get", name):
                self._settings.append((name, value))
        wanted = (
            git.signing or self.run("config", "--type=bool", "--default=false", "--get", "commit.gpgSign") == "true"
        )
        return ["--gpg-sign"] if wanted else []
