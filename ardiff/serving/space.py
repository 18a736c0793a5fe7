"""A Space in one command: brings a Space of the Hugging Face Hub in line with spaces.yaml.

spaces.yaml is the one description of the Space. It has three sections:

    space:
      hardware        a flavour of `huggingface_hub.SpaceHardware`: cpu-basic, zero-a10g, l4x1, ...
      sleep_seconds   of no visit before the Space sleeps, -1 for never; null leaves it to the Hub. Paid hardware only
      visibility      public, private or protected
      volumes         repositories and buckets seen as folders: type (model, dataset, space, bucket), source,
                      mount_path, and where wanted revision, read_only, path
      variables       environment variables, seen by everybody: name to text
      secrets         names of environment variables that nobody sees; their values are those of whoever deploys
      wait_seconds    how long to wait for the Space to run; 0 does not wait
    card:             the header of README.md, key for key, as in the Hub's Spaces configuration reference
    upload:
      allow           patterns of the files that are uploaded; `*` matches across folders
      ignore          patterns of those of them that are not
      delete          patterns of files of the Space that are deleted when they are not (any more) uploaded

What spaces.yaml does not name (a variable that was set by hand, another file) stays as it is unless `prune` is asked for.
Errors in what was given are ValueError, before anything is touched; a Hub that refuses or fails is DeployError.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    SpaceHardware,
    SpaceStage,
    Volume,
    get_token,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj


HARDWARE = tuple(flavour.value for flavour in SpaceHardware)
FIXED_SLEEP = ("cpu-basic", "zero-a10g")
"""Hardware whose sleep time the Hub sets."""

ZERO_GPU_PYTHON = ("3.12.12", "3.10.13")
VISIBILITIES = ("public", "private", "protected")
VOLUME_TYPES = ("model", "dataset", "space", "bucket")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
SHORT_DESCRIPTION = 60
"""Characters of `short_description`, at most: the Hub refuses a longer one."""

CARD_KEYS: dict[str, type] = {
    **dict.fromkeys(
        ("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file"), str
    ),
    **dict.fromkeys(("base_path", "header", "license", "short_description"), str),
    **dict.fromkeys(("startup_duration_timeout", "suggested_hardware", "thumbnail"), str),
    **dict.fromkeys(
        ("datasets", "hf_oauth_authorized_org", "hf_oauth_scopes", "models", "preload_from_hub", "tags"), list
    ),
    **dict.fromkeys(("disable_embedding", "fullWidth", "hf_oauth", "pinned"), bool),
    "custom_headers": dict,
    "hf_oauth_expiration_minutes": int,
}
CARD_REQUIRED = tuple(CARD_KEYS)[:8]
CARD_CHOICES = {
    "colorFrom": COLOURS,
    "colorTo": COLOURS,
    "header": ("mini", "default"),
    "sdk": ("gradio",),
    "suggested_hardware": HARDWARE,
}
TYPE_WORDS = {str: "text", list: "a list of texts", dict: "a mapping", bool: "true or false", int: "a whole number"}

BUSY_STAGES = (
    SpaceStage.BUILDING,
    SpaceStage.RUNNING_BUILDING,
    SpaceStage.APP_STARTING,
    SpaceStage.RUNNING_APP_STARTING,
)
GOOD_STAGES = (SpaceStage.RUNNING, "SLEEPING")
POLL_SECONDS = 5.0
"""Between two looks at a Space that is being built."""

SETTLE_SECONDS = 20.0
"""How long a stage must last to count as that of what was just uploaded, where the Hub does not say which commit runs."""

LOG_LINES = 25
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
HEADER = re.compile(r"\A---\n(.*?\n)---\n", flags=re.DOTALL)


class DeployError(OSError):
    """The Hub refused, broke off or did not get the Space to run; one sentence with what to do."""


# --- spaces.yaml ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpaceSettings:
    """The section `space`. Raises ValueError for what the Hub would refuse."""

    hardware: str
    sleep_seconds: int | None = None
    visibility: str = "public"
    volumes: list[Volume] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    wait_seconds: int = 1800

    def __post_init__(self) -> None:
        _choice("space.hardware", self.hardware, HARDWARE)
        _choice("space.visibility", self.visibility, VISIBILITIES)
        if self.sleep_seconds is not None:
            _whole("space.sleep_seconds", self.sleep_seconds, -1)
            if self.hardware in FIXED_SLEEP:
                raise ValueError(f"`space.sleep_seconds` must be null on {self.hardware}: the Hub sets it there.")
        _whole("space.wait_seconds", self.wait_seconds, 0)
        _typed("space.variables", self.variables, dict)
        _typed("space.secrets", self.secrets, list)
        for name in [*self.variables, *self.secrets]:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(f"Names of variables and secrets must be letters, digits and _ but one is {name!r}.")
        for name, value in self.variables.items():
            _typed(f"space.variables.{name}", value, str)
        twice = sorted({name for name in self.secrets if self.secrets.count(name) > 1 or name in self.variables})
        if twice:
            raise ValueError(f"`space.secrets` must name each secret once, and no variable, but has {twice[0]} twice.")
        paths = [volume.mount_path for volume in self.volumes]
        if len(set(paths)) < len(paths):
            raise ValueError(f"Every volume must have its own `mount_path` but they are {', '.join(paths)}.")


@dataclass(frozen=True, kw_only=True)
class UploadFilter:
    """The section `upload`: patterns of file names, `*` matches across folders."""

    allow: list[str]
    ignore: list[str] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("allow", "ignore", "delete"):
            _typed(f"upload.{name}", getattr(self, name), list)


@dataclass(frozen=True)
class Description:
    """What spaces.yaml says; `read_description` makes it."""

    space: SpaceSettings
    card: dict[str, Any]
    upload: UploadFilter


def read_description(folder: Path) -> Description:
    """Read `folder`/spaces.yaml. Raises ValueError with one sentence: unknown or missing key, wrong type, wrong value."""
    path = folder / "spaces.yaml"
    if not path.is_file():
        raise ValueError(f"The folder to deploy must hold spaces.yaml but {folder} does not.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"spaces.yaml must be YAML but is not: {error}") from error
    content = _keys("spaces.yaml", content, ("space", "card", "upload"), ("space", "card", "upload"))
    settings = _keys("space", content["space"], [key.name for key in fields(SpaceSettings)], ("hardware",))
    upload = _keys("upload", content["upload"], [key.name for key in fields(UploadFilter)], ("allow",))
    volumes = settings.get("volumes", [])
    if not isinstance(volumes, list):
        raise ValueError(f"`space.volumes` must be a list but is {volumes!r}.")
    settings["volumes"] = [_read_volume(volume) for volume in volumes]
    space = SpaceSettings(**settings)
    return Description(space, _read_card(content["card"], space.hardware), UploadFilter(**upload))


def _read_volume(given: Any) -> Volume:
    keys = [key.name for key in fields(Volume)]
    given = _keys("space.volumes", given, keys, ("type", "source", "mount_path"))
    _choice("space.volumes.type", given["type"], VOLUME_TYPES)
    for key, value in given.items():
        _typed(f"space.volumes.{key}", value, bool if key == "read_only" else str)
    if not re.fullmatch(r"/.+", given["mount_path"]):
        raise ValueError(f"`space.volumes.mount_path` must be a path from / on but is {given['mount_path']!r}.")
    if given["type"] != "bucket":  # what the Hub does anyway; said here, so that the Space's answer compares equal
        if given.get("read_only") is False:
            raise ValueError("`space.volumes.read_only` can be false for a bucket only: repositories are read-only.")
        given["read_only"] = True
    return Volume(**given)


def _read_card(given: Any, hardware: str) -> dict[str, Any]:
    card = _keys("card", given, CARD_KEYS, CARD_REQUIRED)
    for key, value in card.items():
        _typed(f"card.{key}", value, CARD_KEYS[key])
        _choice(f"card.{key}", value, CARD_CHOICES.get(key, (value,)))
    length = len(card.get("short_description", ""))
    if length > SHORT_DESCRIPTION:
        raise ValueError(
            f"`card.short_description` must have at most {SHORT_DESCRIPTION} characters but has {length}."
        )
    if hardware == "zero-a10g":
        _choice("card.python_version", card["python_version"], ZERO_GPU_PYTHON)
    return card


def _keys(where: str, value: Any, known: Any, required: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"`{where}` must be a mapping of keys but is {value!r}.")
    for key in value:
        if key not in known:
            raise ValueError(f"`{where}` must have no other keys than {', '.join(known)} but has {key!r}.")
    for key in required:
        if key not in value:
            raise ValueError(f"`{where}` must have the key {key!r} but has only {', '.join(value) or 'none'}.")
    return dict(value)


def _typed(where: str, value: Any, kind: type) -> None:
    right = type(value) is kind and (kind is not list or all(type(entry) is str for entry in value))
    if not right:
        hint = " (put it in quotes)" if kind is str and not isinstance(value, list | dict) else ""
        raise ValueError(f"`{where}` must be {TYPE_WORDS[kind]} but is {value!r}{hint}.")


def _choice(where: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{where}` must be one of {', '.join(map(str, allowed))} but is {value!r}.")


def _whole(where: str, value: Any, low: int) -> None:
    if type(value) is not int or value < low:
        raise ValueError(f"`{where}` must be a whole number from {low} on but is {value!r}.")


# --- the header of README.md ------------------------------------------------------------------------------------


def header(card: Mapping[str, Any]) -> str:
    """The front matter of README.md that says `card`, dashes included."""
    return f"---\n{yaml.safe_dump(dict(card), sort_keys=False, allow_unicode=True, width=1000)}---\n"


def write_header(folder: Path) -> bool:
    """Put the header of spaces.yaml's card at the head of `folder`/README.md; False when it was there already."""
    path = folder / "README.md"
    before = path.read_text(encoding="utf-8")
    after = header(read_description(folder).card) + HEADER.sub("", before, count=1)
    path.write_text(after, encoding="utf-8")
    return after != before


# --- the plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is to be, before the Hub is asked what is: the description, the Space's id, and its files by their path in it."""

    description: Description
    repo_id: str | None
    files: dict[str, Path]
    environ: Mapping[str, str]

    def text(self) -> str:
        """The whole plan, a line for everything that is set and every file. No value of a secret is in it."""
        space, upload = self.description.space, self.description.upload
        secrets = [f"{name} ({'set' if self.environ.get(name) else 'NOT SET'} here)" for name in space.secrets]
        sleep = {None: "as the Hub sets it", -1: "never"}.get(space.sleep_seconds, f"after {space.sleep_seconds} s")
        sizes = {path: local.stat().st_size for path, local in self.files.items()}
        entries = [
            ("Space", [self.repo_id or "no name yet: --repo-id gives it"]),
            ("visibility", [space.visibility]),
            ("hardware", [space.hardware]),
            ("sleeps", [sleep]),
            ("variables", [f"{name}={value}" for name, value in space.variables.items()]),
            ("secrets", secrets),
            ("volumes", [volume.to_uri() for volume in space.volumes]),
            (
                "card",
                [f"{key}: {', '.join(v) if isinstance(v, list) else v}" for key, v in self.description.card.items()],
            ),
            ("upload", [f"{len(sizes)} files, {_bytes(sum(sizes.values()))}"]),
            ("", [f"{path} ({_bytes(size)})" for path, size in sizes.items()]),
            ("delete", [f"{pattern} of the Space, where not uploaded" for pattern in upload.delete]),
            ("wait", [f"{space.wait_seconds} s at most" if space.wait_seconds else "no"]),
        ]
        lines = []
        for name, values in entries:
            for row, value in enumerate(values or ["none"]):
                lines.append(f"{name if row == 0 else '':<12}{value}")
        return "\n".join(lines)


def make_plan(folder: Path, repo_id: str | None, environ: Mapping[str, str]) -> Plan:
    """Read and check everything that can be checked without the Hub. Raises ValueError with one sentence."""
    if repo_id is not None:
        check_repo_id(repo_id)
    description = read_description(folder)
    plan = Plan(description, repo_id, find_files(folder, description.upload), environ)
    for needed in ("README.md", "requirements.txt", description.card["app_file"]):
        if needed not in plan.files:
            raise ValueError(f"`upload` must let {needed} through, which the Space cannot do without, but does not.")
    if not plan.files["README.md"].read_text(encoding="utf-8").startswith(header(description.card)):
        raise ValueError(
            "The header of README.md must be the card of spaces.yaml but differs: `ardiff deploy --write-header` writes it."
        )
    requirements = plan.files["requirements.txt"].read_text(encoding="utf-8").splitlines()
    version = description.card["sdk_version"]
    for line in requirements:  # the Space's builder installs gradio of `sdk_version` beside them
        if re.match(r"gradio\b(?!-)", line) and line != f"gradio=={version}":
            raise ValueError(f"requirements.txt must have gradio=={version}, as `card.sdk_version`, but has {line}.")
    return plan


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless `repo_id` is an account or organisation, a slash and a name."""
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            f"`--repo-id` must be an account, a slash and a name, as me/ardiff (letters, digits, -, _ and .), but is {repo_id!r}."
        )


def find_files(folder: Path, upload: UploadFilter) -> dict[str, Path]:
    """The files that the filter lets through, by their path in the Space. Raises ValueError for a link or an idle pattern."""
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != ".git"]
        links = [name for name in folders if Path(top, name).is_symlink()]  # to folders: not walked, not passed over
        found += [Path(top, name) for name in (*names, *links)]
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(found)}
    for pattern in upload.allow:
        if not list(filter_repo_objects(paths, allow_patterns=[pattern])):
            raise ValueError(
                f"Every pattern of `upload.allow` must match a file of {folder} but {pattern!r} does not."
            )
    chosen = list(filter_repo_objects(paths, allow_patterns=upload.allow, ignore_patterns=upload.ignore))
    for path in chosen:
        if paths[path].is_symlink():
            raise ValueError(f"Only files are uploaded but {path} is a link; `upload.ignore` can name it.")
    return {path: paths[path] for path in chosen}


def _bytes(count: int) -> str:
    return (
        f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{count / 2**10:.1f} KB" if count >= 2**10 else f"{count} B"
    )


# --- what differs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpaceState:
    """A Space as it is at the Hub; `head` is its latest commit, `files` are those of that commit."""

    head: str
    visibility: str
    hardware: str | None
    sleep_seconds: int | None
    volumes: dict[str, Volume]
    variables: dict[str, str]
    secrets: list[str]
    files: dict[str, RepoFile]


def read_state(api: HfApi, repo_id: str) -> SpaceState | None:
    """Ask the Hub for all that a description can set; None when there is no such Space, or none that the token may see."""
    try:
        info = api.space_info(repo_id)
    except RepositoryNotFoundError:
        return None
    runtime = api.get_space_runtime(repo_id)
    tree = api.list_repo_tree(repo_id, repo_type="space", recursive=True, revision=info.sha)
    return SpaceState(
        head=info.sha,
        visibility=getattr(info, "visibility", "private" if info.private else "public"),
        hardware=runtime.requested_hardware or runtime.hardware,
        sleep_seconds=runtime.sleep_time,
        volumes={volume.mount_path: volume for volume in runtime.volumes or []},
        variables={name: variable.value for name, variable in api.get_space_variables(repo_id).items()},
        secrets=list(api.get_space_secrets(repo_id)),
        files={entry.path: entry for entry in tree if isinstance(entry, RepoFile)},
    )


@dataclass(frozen=True)
class Change:
    """One thing to do at the Hub, and its words."""

    words: str
    apply: Callable[[], Any]


def list_changes(
    plan: Plan, state: SpaceState | None, api: HfApi, *, prune: bool, update_secrets: bool
) -> tuple[list[Change], list[str]]:
    """What makes `state` that of `plan`, in order, and what stays as it is. Touches nothing.

    Raises ValueError when a secret that must be sent is not set here.
    """
    if state is None:
        return [_creation(plan, api), *_upload(plan, api, {}, None)], []
    settings, left = _settings(plan, state, api, prune=prune, update_secrets=update_secrets)
    return [*settings, *_upload(plan, api, state.files, state.head)], left


def _creation(plan: Plan, api: HfApi) -> Change:
    space = plan.description.space
    secrets = [{"key": name, "value": value} for name, value in _secret_values(plan, space.secrets).items()]
    variables = [{"key": name, "value": value} for name, value in space.variables.items()]
    create = partial(
        api.create_repo,
        plan.repo_id,
        repo_type="space",
        visibility=space.visibility,
        space_sdk=plan.description.card["sdk"],
        space_hardware=space.hardware,
        space_sleep_time=space.sleep_seconds,
        space_secrets=secrets or None,
        space_variables=variables or None,
        space_volumes=space.volumes or None,
    )
    return Change(f"create {plan.repo_id} with its settings", create)


def _settings(
    plan: Plan, state: SpaceState, api: HfApi, *, prune: bool, update_secrets: bool
) -> tuple[list[Change], list[str]]:
    repo_id, space = plan.repo_id, plan.description.space
    changes, left = [], []

    def change(words: str, call: Callable[..., Any], *values: Any, **options: Any) -> None:
        changes.append(Change(words, partial(call, repo_id, *values, **options)))

    if state.visibility != space.visibility:
        words = f"visibility {state.visibility} -> {space.visibility}"
        change(words, api.update_repo_settings, repo_type="space", visibility=space.visibility)
    for name, value in space.variables.items():
        before = state.variables.get(name)
        if before != value:
            change(f"variable {name}: {before or 'none'} -> {value}", api.add_space_variable, name, value)
    there = [] if update_secrets else [name for name in space.secrets if name in state.secrets]
    left += [f"secret {name}: values cannot be compared (--update-secrets sends it again)" for name in there]
    to_send = [name for name in space.secrets if name not in there]
    for name, value in _secret_values(plan, to_send).items():
        change(f"secret {name}: sent", api.add_space_secret, name, value)
    for kind, names, named, delete in (
        ("variable", state.variables, space.variables, api.delete_space_variable),
        ("secret", state.secrets, space.secrets, api.delete_space_secret),
    ):
        for name in names:
            if name not in named and prune:
                change(f"{kind} {name}: deleted", delete, name)
            elif name not in named:
                left.append(f"{kind} {name}: not in spaces.yaml (--prune deletes it)")
    volumes = {volume.mount_path: volume for volume in space.volumes}
    strange = [path for path in state.volumes if path not in volumes and not prune]
    left += [f"volume at {path}: not in spaces.yaml (--prune takes it off)" for path in strange]
    volumes |= {path: state.volumes[path] for path in strange}
    if {_volume_key(volume) for volume in volumes.values()} != {
        _volume_key(volume) for volume in state.volumes.values()
    }:
        if volumes:
            words = f"volumes -> {', '.join(volume.to_uri() for volume in volumes.values())}"
            change(words, api.set_space_volumes, list(volumes.values()))
        else:
            change("volumes -> none", api.delete_space_volumes)
    if state.hardware != space.hardware:
        words = f"hardware {state.hardware} -> {space.hardware}"
        change(words, api.request_space_hardware, space.hardware, sleep_time=space.sleep_seconds)
    elif space.sleep_seconds is not None and state.sleep_seconds != space.sleep_seconds:
        words = f"sleeps after {state.sleep_seconds} s -> {space.sleep_seconds} s"
        change(words, api.set_space_sleep_time, space.sleep_seconds)
    return changes, left


def _secret_values(plan: Plan, names: list[str]) -> dict[str, str]:
    missing = [name for name in names if not plan.environ.get(name)]
    if missing:
        raise ValueError(f"The secret {missing[0]} must be set as an environment variable here but is not.")
    return {name: plan.environ[name] for name in names}


def _volume_key(volume: Volume) -> tuple[Any, ...]:
    """What two volumes that are the same have in common: the Hub fills in what was left out."""
    given = asdict(volume)
    filled = {
        "revision": given["revision"] or "main",
        "read_only": bool(given["read_only"]),
        "path": given["path"] or None,
    }
    return tuple((given | filled).items())


def _upload(plan: Plan, api: HfApi, remote: dict[str, RepoFile], head: str | None) -> list[Change]:
    """One commit of the files that differ, or nothing; one, since every commit builds the Space anew."""
    changed = [path for path, local in plan.files.items() if path not in remote or not _same(local, remote[path])]
    patterns = plan.description.upload.delete
    gone = [
        path
        for path in filter_repo_objects(remote, allow_patterns=patterns, ignore_patterns=".gitattributes")
        if path not in plan.files
    ]
    if not changed and not gone:
        return []
    operations = [
        *(CommitOperationAdd(path, plan.files[path]) for path in changed),
        *(CommitOperationDelete(path) for path in gone),
    ]
    commit = partial(
        api.create_commit,
        plan.repo_id,
        operations,
        commit_message="Deploy with ardiff",
        repo_type="space",
        parent_commit=head,  # a commit by somebody else in between is an error and not overwritten
    )
    words = [f"upload {changed[0] if len(changed) == 1 else f'{len(changed)} files'}"] if changed else []
    words += [f"delete {', '.join(gone)}"] if gone else []
    return [Change(" and ".join(words), commit)]


def _same(local: Path, remote: RepoFile) -> bool:
    """Whether the Space has this very file: the Hub names small files by git's hash and large ones by SHA-256."""
    if remote.lfs is None:
        return git_hash(local.read_bytes()) == remote.blob_id
    with local.open("rb") as file:
        return sha_fileobj(file).hex() == remote.lfs.sha256


# --- doing it ---------------------------------------------------------------------------------------------------


def deploy(
    folder: Path,
    repo_id: str | None,
    *,
    say: Callable[[str], None],
    api: HfApi | None = None,
    environ: Mapping[str, str] = os.environ,
    dry_run: bool = False,
    prune: bool = False,
    update_secrets: bool = False,
) -> None:
    """Create the Space, or change what differs, and wait until it runs. Asked twice, the second time changes nothing.

    Args:
        folder: the repository's root, with spaces.yaml.
        repo_id: the Space, as me/ardiff; None for a dry run only.
        say: gets what there is to tell, a text of one or more lines at a time.
        api: the Hub; None: the usual one, with the token of `hf auth login` or HF_TOKEN.
        environ: where the secrets' values are.
        dry_run: tell the plan and end: no network, no token.
        prune: delete variables, secrets and volumes that spaces.yaml does not name.
        update_secrets: send secrets again that the Space has already; their values cannot be compared.

    Raises:
        ValueError: what was given is wrong; nothing was touched.
        DeployError: the Hub refused or failed, or the Space does not run. A second call goes on where the first broke off.
    """
    plan = make_plan(folder, repo_id, environ)
    say(plan.text())
    if dry_run:
        say("dry run: the Hub was not asked and nothing was changed")
        return
    if repo_id is None:
        raise ValueError("`--repo-id` must name the Space, as me/ardiff, but is not given.")
    api = HfApi() if api is None else api
    check_token(api)
    with _asking(f"Reading {repo_id}"):
        state = read_state(api, repo_id)
    changes, left = list_changes(plan, state, api, prune=prune, update_secrets=update_secrets)
    for line in left:
        say(f"left as it is: {line}")
    for number, change in enumerate(changes, 1):
        say(f"{number}/{len(changes)} {change.words}")
        with _asking(
            f"Step {number} of {len(changes)} ({change.words})", "; the same command again goes on from here"
        ):
            change.apply()
    if not changes:
        say("nothing differs: nothing was changed")
    uploaded = any(change.apply.func == api.create_commit for change in changes)
    _wait(plan, api, say, uploaded=uploaded, settle_seconds=SETTLE_SECONDS if changes else 0.0)


def check_token(api: HfApi) -> None:
    """Raises ValueError when there is no token, DeployError when the Hub does not take it, or not for writing."""
    if not (api.token or get_token()):
        raise ValueError("There must be a token of the Hub: `hf auth login`, or the environment variable HF_TOKEN.")
    with _asking(f"Signing in at {api.endpoint}"):
        token = api.whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ValueError("The token of the Hub must be one that may write but may only read.")


def _wait(plan: Plan, api: HfApi, say: Callable[[str], None], *, uploaded: bool, settle_seconds: float) -> None:
    """Tell each stage until the Space runs what it should. Raises DeployError, after the last lines of the log, if it fails.

    The Hub answers with the stage of before for a moment: a stage counts when it is that of the uploaded commit, or has lasted.
    """
    repo_id, limit = plan.repo_id, plan.description.space.wait_seconds
    started = since = time.monotonic()
    stage, stop_at = None, started + limit
    with _asking(f"Waiting for {repo_id}"):
        head = api.space_info(repo_id).sha
        while True:
            runtime = api.get_space_runtime(repo_id)
            now = time.monotonic()
            if runtime.stage != stage:
                stage, since = runtime.stage, now
                say(f"{now - started:6.1f} s  {stage}")
            settled = (uploaded and runtime.raw.get("sha") == head) or now - since >= settle_seconds
            if limit == 0 or (stage not in BUSY_STAGES and settled):
                break
            if now > stop_at:
                raise DeployError(f"{repo_id} is still in stage {stage} after {limit} s (`space.wait_seconds`).")
            time.sleep(POLL_SECONDS)
    url = f"{api.endpoint}/spaces/{repo_id}"
    if stage in GOOD_STAGES or limit == 0:
        say(f"{url} is {stage}")
        return
    if stage in (SpaceStage.BUILD_ERROR, SpaceStage.RUNTIME_ERROR):
        say(_last_lines(api, repo_id, build=stage == SpaceStage.BUILD_ERROR))
    reason = runtime.raw.get("errorMessage")
    raise DeployError(f"{url} is in stage {stage}{f': {reason}' if reason else ''}.")


def _last_lines(api: HfApi, repo_id: str, *, build: bool) -> str:
    kind = "build" if build else "run"
    try:
        log = "".join(
            line if line.endswith("\n") else f"{line}\n" for line in api.fetch_space_logs(repo_id, build=build)
        )
    except Exception as error:  # the stage must be told, log or not
        return f"the {kind} log cannot be read ({_words(error)})"
    return "\n".join([f"the last lines of the {kind} log:", *log.splitlines()[-LOG_LINES:]])


@contextmanager
def _asking(what: str, advice: str = "") -> Iterator[None]:
    """Turn what goes wrong at the Hub into a DeployError: the client raises errors of its own, of its HTTP and Xet layers."""
    try:
        yield
    except DeployError:
        raise
    except Exception as error:
        raise DeployError(f"{what} failed: {_words(error)}{advice}.") from error


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
