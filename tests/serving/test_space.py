"""`ardiff deploy` against a Hub on 127.0.0.1: what it creates, what it changes, what it leaves, and what it says when it fails."""

import hashlib
import re
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants

from ardiff import cli
from ardiff.serving.space import DeployError, deploy, header, make_plan, read_description, write_header


ROOT = Path(__file__).resolve().parents[2]
ID = "me/ardiff"
SECRETS = {"ARDIFF_KEY": "s3cret-key", "OTHER": "s3cret-other"}
UPLOADED = {
    "LICENSE", "README.md", "app.py", "requirements.txt",
    "ardiff/__init__.py", "ardiff/models/part.py", "assets/weights.safetensors", "examples/clip.mp4",
}  # fmt: skip
SETTINGS = {
    "hardware": "l4x1",
    "sleep_seconds": 600,
    "visibility": "private",
    "volumes": [
        {"type": "model", "source": "me/weights", "mount_path": "/models/w"},
        {"type": "bucket", "source": "me/runs", "mount_path": "/data", "path": "kept"},
    ],
    "variables": {"GRADIO_ANALYTICS_ENABLED": "False", "LEVEL": "1"},
    "secrets": ["ARDIFF_KEY", "OTHER"],
    "wait_seconds": 60,
}


def change_yaml(folder, section=None, **values):
    """Write spaces.yaml with other values (None of `section`: at the top); Ellipsis takes a key out."""
    path = folder / "spaces.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    place = content if section is None else content[section]
    place |= values
    for key in [key for key, value in values.items() if value is ...]:
        del place[key]
    path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")


class Told(list):
    """What was told, as `say` takes it."""

    def __call__(self, text):
        self.append(text)

    def __str__(self):
        return "\n".join(self)


def run(folder, api, **options):
    told = Told()
    deploy(folder, ID, say=told, api=api, **({"environ": SECRETS} | options))
    return told


def contents(space):
    """Files of a Space by name: their bytes, or the SHA-256 and size of large ones."""
    return space.files | space.large


def expected(folder):
    files = {path: (folder / path).read_bytes() for path in UPLOADED}
    data = files["assets/weights.safetensors"]
    files["assets/weights.safetensors"] = (hashlib.sha256(data).hexdigest(), len(data))
    return files


def settings_of(space):
    volumes = {volume["mountPath"]: volume for volume in space.volumes}
    return space.visibility, space.hardware, space.sleep, space.variables, space.secrets, sorted(volumes)


WANTED = ("private", "l4x1", 600, SETTINGS["variables"], SECRETS, ["/data", "/models/w"])


@pytest.fixture
def full(folder):
    """The small repository with every setting given."""
    change_yaml(folder, "space", **SETTINGS)
    return folder


# --- the plan ---------------------------------------------------------------------------------------------------


def test_dry_run_tells_the_whole_plan_and_asks_nobody(full, hub):
    told = Told()
    deploy(full, ID, say=told, api=HfApi(endpoint=hub.url), environ={"OTHER": "s3cret-other"}, dry_run=True)
    assert hub.requests == []
    lines = [line.strip() for line in str(told).splitlines()]
    for path in UPLOADED:
        assert any(line.startswith(f"{path} (") for line in lines), path
    assert not re.search(r"pycache|\.secret|big\.bin|tests/|\.git", str(told))
    for words in (
        "me/ardiff",
        "l4x1",
        "private",
        "600 s",
        "LEVEL=1",
        "hf://models/me/weights",
        "hf://buckets/me/runs",
    ):
        assert words in str(told), words
    assert "ARDIFF_KEY (NOT SET here)" in str(told)
    assert "OTHER (set here)" in str(told)
    assert "s3cret" not in str(told)
    for key in read_description(full).card:
        assert f"{key}: " in str(told)


def test_dry_run_of_this_repository_needs_no_name(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert cli.main(["deploy", "--dry-run"]) == 0
    assert "ardiff/serving/space.py" in capsys.readouterr().out


def test_plan_holds_no_file_beside_the_filter(folder):
    assert set(make_plan(folder, ID, {}).files) == UPLOADED


# --- create, then change what differs ---------------------------------------------------------------------------


def test_a_new_space_gets_everything_at_once(full, hub, api):
    told = run(full, api)
    space = hub.spaces[ID]
    assert settings_of(space) == WANTED
    assert space.sdk == "gradio"
    assert space.volumes[0] == {"type": "model", "source": "me/weights", "mountPath": "/models/w", "readOnly": True}
    assert contents(space) == expected(full) | {".gitattributes": space.files[".gitattributes"]}
    weights = full / "assets/weights.safetensors"
    assert sum(path.stat().st_size for path in hub.cas.rglob("default.*")) >= weights.stat().st_size
    assert hub.writes == ["POST /api/repos/create", f"POST /api/spaces/{ID}/commit/main"]
    assert [line.split()[-1] for line in told if " s  " in line] == [
        "NO_APP_FILE",
        "BUILDING",
        "APP_STARTING",
        "RUNNING",
    ]
    assert told[-1] == f"{hub.url}/spaces/{ID} is RUNNING"
    assert "s3cret" not in str(told)


def test_the_second_time_nothing_is_written(full, hub, api):
    run(full, api)
    hub.writes.clear()
    told = run(full, api, environ={})
    assert hub.writes == []
    assert "nothing differs" in str(told)


VOLUMES = SETTINGS["volumes"]


@pytest.mark.parametrize(
    ("values", "writes", "after"),
    [
        ({"visibility": "public"}, ["PUT settings"], ("public", *WANTED[1:])),
        ({"hardware": "t4-small"}, ["POST hardware"], ("private", "t4-small", *WANTED[2:])),
        ({"sleep_seconds": -1}, ["POST sleeptime"], (*WANTED[:2], -1, *WANTED[3:])),
        (
            {"variables": {**SETTINGS["variables"], "LEVEL": "2"}},
            ["POST variables"],
            (*WANTED[:3], {**SETTINGS["variables"], "LEVEL": "2"}, *WANTED[4:]),
        ),
        (
            {"secrets": ["ARDIFF_KEY", "OTHER", "NEW"]},
            ["POST secrets"],
            (*WANTED[:4], {**SECRETS, "NEW": "s3cret-new"}, WANTED[5]),
        ),
        (
            {"volumes": [*VOLUMES, {"type": "dataset", "source": "me/clips", "mount_path": "/clips"}]},
            ["PUT volumes"],
            (*WANTED[:5], ["/clips", "/data", "/models/w"]),
        ),
        ({"volumes": [{**VOLUMES[0], "source": "me/other"}, VOLUMES[1]]}, ["PUT volumes"], WANTED),
        ({"volumes": [{**VOLUMES[0], "revision": "main"}, VOLUMES[1]]}, [], WANTED),
    ],
)
def test_one_difference_is_one_call(full, hub, api, values, writes, after):
    run(full, api)
    hub.writes.clear()
    change_yaml(full, "space", **values)
    run(full, api, environ={**SECRETS, "NEW": "s3cret-new"})
    assert [write.replace(f"/api/spaces/{ID}/", "") for write in hub.writes] == writes
    assert settings_of(hub.spaces[ID]) == after


def test_only_files_that_differ_are_committed(folder, hub, api, monkeypatch):
    run(folder, api)
    (folder / "ardiff/models/part.py").rename(folder / "ardiff/models/whole.py")
    (folder / "app.py").write_text("print()\n")
    (folder / "assets/weights.safetensors").write_bytes(hashlib.shake_128().digest(200_000))
    hub.spaces[ID].files["notes.txt"] = b"by hand"
    hub.writes.clear()
    sent = []
    send = HfApi.create_commit
    monkeypatch.setattr(
        HfApi, "create_commit", lambda api, repo, ops, **k: (sent.extend(ops), send(api, repo, ops, **k))
    )
    told = run(folder, api)
    assert hub.writes == [f"POST /api/spaces/{ID}/commit/main"]
    assert {op.path_in_repo for op in sent} == {
        "ardiff/models/part.py", "ardiff/models/whole.py", "app.py", "assets/weights.safetensors",
    }  # fmt: skip
    space = hub.spaces[ID]
    assert "ardiff/models/part.py" not in space.files
    assert space.files["ardiff/models/whole.py"] == b"PART = 1\n"
    assert space.files["app.py"] == b"print()\n"
    assert space.large["assets/weights.safetensors"][1] == 200_000
    assert {"notes.txt", ".gitattributes"} <= set(space.files)
    assert "upload 3 files and delete ardiff/models/part.py" in str(told)


def test_gitattributes_outlives_a_pattern_that_names_everything(folder, hub, api):
    run(folder, api)
    hub.spaces[ID].files["notes.txt"] = b"by hand"
    change_yaml(folder, "upload", delete=["*"])
    run(folder, api)
    assert set(contents(hub.spaces[ID])) == {*UPLOADED, ".gitattributes"}


def test_what_was_set_by_hand_stays_unless_pruned(full, hub, api):
    run(full, api)
    space = hub.spaces[ID]
    space.variables["HAND"] = "1"
    space.secrets["HAND_SECRET"] = "1"
    space.volumes.append({"type": "bucket", "source": "me/x", "mountPath": "/x", "readOnly": False})
    hub.writes.clear()
    told = run(full, api)
    assert hub.writes == []
    for name in ("HAND", "HAND_SECRET", "/x"):
        assert f"{name}: not in spaces.yaml" in str(told)
    run(full, api, prune=True)
    assert settings_of(space) == WANTED
    change_yaml(full, "space", volumes=[], variables={}, secrets=[])
    run(full, api, prune=True)
    assert settings_of(space) == (*WANTED[:3], {}, {}, [])


def test_a_volume_more_keeps_those_set_by_hand(full, hub, api):
    run(full, api)
    space = hub.spaces[ID]
    space.volumes = [{"type": "bucket", "source": "me/x", "mountPath": "/x", "readOnly": False}]
    run(full, api)
    assert [volume["mountPath"] for volume in space.volumes] == ["/models/w", "/data", "/x"]


def test_secrets_are_sent_again_only_when_asked(full, hub, api):
    run(full, api)
    run(full, api, environ={**SECRETS, "OTHER": "rotated"})
    assert hub.spaces[ID].secrets["OTHER"] == SECRETS["OTHER"]
    run(full, api, environ={**SECRETS, "OTHER": "rotated"}, update_secrets=True)
    assert hub.spaces[ID].secrets["OTHER"] == "rotated"


# --- half-way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", ["POST /api/repos/create", f"POST /api/spaces/{ID}/preupload", f"POST /api/spaces/{ID}/commit"]
)
def test_a_creation_that_breaks_off_is_finished_by_a_second_run(full, hub, api, step):
    hub.fail(step, 403, "no more room")
    with pytest.raises(DeployError, match=r"failed: .*no more room.*; the same command again goes on from here"):
        run(full, api)
    assert bool(hub.spaces) == (step != "POST /api/repos/create")
    run(full, api)
    space = hub.spaces[ID]
    assert settings_of(space) == WANTED
    assert contents(space) == expected(full) | {".gitattributes": space.files[".gitattributes"]}


def test_a_large_file_that_is_refused_is_sent_by_a_second_run(folder, hub, api):
    hub.fail(f"GET /api/spaces/{ID}/xet-write-token", 403, "no more room")
    with pytest.raises(DeployError, match="Step 2 of 2"):
        run(folder, api)
    run(folder, api)
    assert contents(hub.spaces[ID])["assets/weights.safetensors"] == expected(folder)["assets/weights.safetensors"]


@pytest.mark.parametrize("step", ["/api/repos/create", f"/api/spaces/{ID}/commit/main"])
def test_what_was_done_although_its_answer_was_lost_is_not_done_again(full, hub, api, step):
    hub.lose_answer(f"POST {step}")
    with pytest.raises(DeployError, match="the same command again goes on from here"):
        run(full, api)
    run(full, api)
    assert settings_of(hub.spaces[ID]) == WANTED
    assert contents(hub.spaces[ID])["app.py"] == (full / "app.py").read_bytes()
    assert hub.writes == ["POST /api/repos/create", f"POST /api/spaces/{ID}/commit/main"]


STEPS = ["settings", "variables", "secrets", "volumes", "hardware", "commit"]


@pytest.mark.parametrize("step", STEPS)
def test_an_update_that_breaks_off_is_finished_by_a_second_run(folder, hub, api, step):
    run(folder, api)
    hub.writes.clear()
    change_yaml(folder, "space", **SETTINGS)
    (folder / "app.py").write_text("print()\n")
    method = "PUT" if step in ("settings", "volumes") else "POST"
    hub.fail(f"{method} /api/spaces/{ID}/{step}", 500, "the Hub is tired")
    with pytest.raises(DeployError, match="the Hub is tired"):
        run(folder, api)
    first = [write.split("/")[5] for write in hub.writes]
    assert step not in first
    hub.writes.clear()
    run(folder, api)
    second = [write.split("/")[5] for write in hub.writes]
    assert settings_of(hub.spaces[ID]) == WANTED
    assert contents(hub.spaces[ID])["app.py"] == b"print()\n"
    assert sorted(first + second) == sorted([*STEPS, "secrets"])  # two secrets; nothing was done twice


def test_a_commit_by_somebody_else_is_not_overwritten(folder, hub, api):
    run(folder, api)
    (folder / "app.py").write_text("print()\n")

    def other(space):
        space.files["app.py"] = b"theirs"
        space.commits += 1

    hub.before_commit = other
    with pytest.raises(DeployError, match="A commit has happened since"):
        run(folder, api)
    assert hub.spaces[ID].files["app.py"] == b"theirs"


# --- refused before anything is touched -------------------------------------------------------------------------


CARD = yaml.safe_load((ROOT / "spaces.yaml").read_text(encoding="utf-8"))["card"]


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        (None, {"extra": 1}, "extra"),
        (None, {"upload": ...}, "upload"),
        (None, {"space": "cpu-basic"}, "`space` must be a mapping"),
        ("space", {"hardwear": "l4x1"}, "hardwear"),
        ("space", {"hardware": ...}, "hardware"),
        ("space", {"hardware": "cpu"}, "must be one of cpu-basic"),
        ("space", {"visibility": "hidden"}, "hidden"),
        ("space", {"sleep_seconds": 600}, "null on cpu-basic"),
        ("space", {"hardware": "l4x1", "sleep_seconds": -2}, "-2"),
        ("space", {"wait_seconds": -1}, "wait_seconds"),
        ("space", {"wait_seconds": True}, "wait_seconds"),
        ("space", {"variables": {"A": False}}, "in quotes"),
        ("space", {"variables": ["A"]}, "variables"),
        ("space", {"variables": {"A B": "1"}}, "A B"),
        ("space", {"secrets": [1]}, "secrets"),
        ("space", {"secrets": ["A", "A"]}, "A twice"),
        ("space", {"secrets": ["A"], "variables": {"A": "1"}}, "no variable"),
        ("space", {"secrets": ["ABSENT"]}, "ABSENT must be set"),
        ("space", {"volumes": {}}, "volumes"),
        ("space", {"volumes": [{"type": "model", "source": "a/b"}]}, "mount_path"),
        ("space", {"volumes": [{"type": "disk", "source": "a/b", "mount_path": "/a"}]}, "disk"),
        ("space", {"volumes": [{"type": "model", "source": "a/b", "mount_path": "a"}]}, "from / on"),
        ("space", {"volumes": [{"type": "model", "source": "a/b", "mount_path": "/a", "size": "1"}]}, "size"),
        ("space", {"volumes": [{"type": "model", "source": "a/b", "mount_path": "/a", "read_only": False}]}, "bucket"),
        ("space", {"volumes": [{"type": "model", "source": "a/b", "mount_path": "/a"}] * 2}, "own `mount_path`"),
        ("space", {"hardware": "zero-a10g", "sleep_seconds": 5}, "null on zero-a10g"),
        ("card", {"colour": "red"}, "colour"),
        ("card", {"colorFrom": "violet"}, "violet"),
        ("card", {"sdk": "docker"}, "docker"),
        ("card", {"title": ...}, "title"),
        ("card", {"python_version": 3.1}, "in quotes"),
        ("card", {"tags": "video"}, "a list of texts"),
        ("card", {"pinned": "yes"}, "true or false"),
        ("card", {"short_description": "x" * 61}, "has 61"),
        ("card", {"title": "another"}, "--write-header"),
        ("upload", {"allow": ["**"], "ignore": ["app.py"]}, "app.py"),
        ("upload", {"allow": ["ardiff/**", "nowhere/**"]}, "nowhere"),
        ("upload", {"allow": "**"}, "upload.allow"),
        ("upload", {"remove": []}, "remove"),
    ],
)
def test_a_wrong_description_is_refused_in_one_sentence(folder, hub, api, section, values, named):
    change_yaml(folder, section, **values)
    with pytest.raises(ValueError, match=re.escape(named)) as refused:
        run(folder, api)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")
    assert hub.writes == []
    if "ABSENT" not in named:
        assert hub.requests == []


def test_zero_gpu_takes_its_own_python_only(folder):
    change_yaml(folder, "space", hardware="zero-a10g")
    assert read_description(folder).space.hardware == "zero-a10g"
    change_yaml(folder, "card", python_version="3.12")
    with pytest.raises(ValueError, match="python_version"):
        read_description(folder)


def test_gradio_must_be_that_of_the_card(folder):
    path = folder / "requirements.txt"
    path.write_text(path.read_text().replace("gradio==", "gradio>="))
    with pytest.raises(ValueError, match="gradio=="):
        make_plan(folder, ID, {})


def test_yaml_that_is_none_is_refused(folder):
    (folder / "spaces.yaml").write_text("space: [")
    with pytest.raises(ValueError, match=r"spaces\.yaml must be YAML"):
        read_description(folder)


@pytest.mark.parametrize("link", ["ardiff/key.py", "ardiff/folder"])
def test_links_are_refused_not_followed(folder, tmp_path, link):
    target = tmp_path / "outside"
    target.mkdir()
    (target / "key").write_text("private")
    (folder / link).symlink_to(target / "key" if link.endswith(".py") else target)
    with pytest.raises(ValueError, match=f"{link} is a link"):
        make_plan(folder, ID, {})


@pytest.mark.parametrize(
    "repo_id", ["ardiff", "me/", "/ardiff", "me/a/b", "me/ardiff ", "me/a--b", "-me/a", "me/a.git", ""]
)
def test_a_name_of_wrong_form_is_refused(folder, hub, api, repo_id):
    with pytest.raises(ValueError, match="`--repo-id` must be an account, a slash and a name"):
        deploy(folder, repo_id, say=Told(), api=api)
    assert hub.requests == []


def test_a_name_must_be_given(folder, hub, api):
    with pytest.raises(ValueError, match="`--repo-id` must name the Space"):
        deploy(folder, None, say=Told(), api=api)
    assert hub.requests == []


def test_no_token_is_said_before_the_hub_is_asked(folder, hub):
    with pytest.raises(ValueError, match="HF_TOKEN"):
        run(folder, HfApi(endpoint=hub.url))
    assert hub.requests == []


def test_a_token_that_may_only_read_is_refused(folder, hub, api):
    hub.role = "read"
    with pytest.raises(ValueError, match="may only read"):
        run(folder, api)
    assert hub.writes == []


def test_a_wrong_token_is_refused(folder, hub):
    with pytest.raises(DeployError, match=r"Signing in .* failed: .*Invalid user token"):
        run(folder, HfApi(endpoint=hub.url, token="hf_wrong"))
    assert hub.writes == []


def test_a_hub_out_of_reach_is_said(folder, hub):
    hub.server_close()
    with pytest.raises(DeployError, match=r"Signing in at http://127\.0\.0\.1"):
        run(folder, HfApi(endpoint=hub.url, token="hf_any"))


# --- waiting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "kind"), [("BUILD_ERROR", "build"), ("RUNTIME_ERROR", "run")])
def test_a_space_that_fails_is_told_with_the_end_of_its_log(folder, hub, api, stage, kind):
    hub.script = ["BUILDING", stage]
    hub.logs[kind] = [f"line {number}\n" for number in range(100)] + ["ERROR: ResolutionImpossible"]
    told = Told()
    with pytest.raises(DeployError, match=f"is in stage {stage}"):
        deploy(folder, ID, say=told, api=api, environ={})
    log = told[-1].splitlines()
    assert log[0] == f"the last lines of the {kind} log:"
    assert log[-1] == "ERROR: ResolutionImpossible"
    assert log[1] == "line 76"


def test_a_log_that_cannot_be_read_does_not_hide_the_stage(folder, hub, api):
    hub.script = ["RUNTIME_ERROR"]
    hub.fail(f"GET /api/spaces/{ID}/logs", 403, "not yours")
    with pytest.raises(DeployError, match="is in stage RUNTIME_ERROR"):
        run(folder, api)


def test_the_stage_of_before_is_not_believed(folder, hub, api, monkeypatch):
    run(folder, api)
    monkeypatch.setattr("ardiff.serving.space.SETTLE_SECONDS", 5.0)
    (folder / "app.py").write_text("print()\n")
    hub.script = ["BUILDING", "BUILD_ERROR"]
    with pytest.raises(DeployError, match="BUILD_ERROR"):
        run(folder, api)


def test_waiting_ends(folder, hub, api):
    change_yaml(folder, "space", wait_seconds=1)
    hub.script = ["BUILDING"]
    started = time.monotonic()
    with pytest.raises(DeployError, match="still in stage BUILDING after 1 s"):
        run(folder, api)
    assert 1.0 <= time.monotonic() - started < 5.0


def test_no_wait(folder, hub, api):
    change_yaml(folder, "space", wait_seconds=0)
    told = run(folder, api)
    assert told[-1].endswith("is NO_APP_FILE")


def test_a_space_that_sleeps_is_well(folder, hub, api):
    run(folder, api)
    hub.spaces[ID].stages = ["SLEEPING"]
    assert run(folder, api)[-1].endswith("is SLEEPING")


# --- the header, and the command --------------------------------------------------------------------------------


def test_header_is_written_once_and_read_back(folder):
    change_yaml(folder, "card", title="another: title", emoji="🦊")
    body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    assert write_header(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1]) == read_description(folder).card
    assert text == header(read_description(folder).card) + body
    assert not write_header(folder)
    (folder / "README.md").write_text(body, encoding="utf-8")
    assert write_header(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == text


def test_the_command_writes_the_header(folder, capsys):
    change_yaml(folder, "card", title="another")
    for told in ("header written", "nothing to change"):
        assert cli.main(["deploy", "--write-header", "--folder", str(folder)]) == 0
        assert told in capsys.readouterr().out
    assert "title: another\n" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_command_deploys_this_repository(hub, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_token-of-the-tests")
    assert cli.main(["deploy", "--repo-id", ID]) == 0
    space = hub.spaces[ID]
    assert space.files["app.py"] == (ROOT / "app.py").read_bytes()
    weights = "assets/models/scenes-64/vae/diffusion_pytorch_model.safetensors"
    assert space.large[weights][0] == hashlib.sha256((ROOT / weights).read_bytes()).hexdigest()
    assert "is RUNNING" in capsys.readouterr().out
    hub.fail("GET /api/whoami-v2", 503, "closed for an hour")
    assert cli.main(["deploy", "--repo-id", ID]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ardiff: Signing in")
    assert error.count("\n") == 1
