"""What a job takes along, and how its command survives a shell."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from ftray.cluster.bundle import collect, command_line
from ftray.config.job import JobConfig
from ftray.core.errors import ClusterError, ConfigError, FtrayError
from ftray.core.spec import parse

NASTY = [
    "a b",
    "x; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "a'b",
    'a"b',
    "a\nb",
    "&& touch pwned",
    "*",
    "~",
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it: a recipe, what it names, and much that it does not."""
    (tmp_path / "data").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "runs").mkdir()
    for name in (
        "data/a.jsonl",
        "data/b.jsonl",
        "data/other.jsonl",
        "base/config.json",
        "runs/old.bin",
        ".env",
    ):
        (tmp_path / name).write_text("{}")
    (tmp_path / "mine.py").write_text("class Mine: pass")
    (tmp_path / "recipe.yaml").write_text(
        "name: r\noutput_dir: runs\nmodel: {model_name_or_path: base}\n"
        "data: {train: [data/a.jsonl, 'data/[b]*.jsonl'], validation: /shared/v.jsonl}\n"
        "adapt: lora\nobjective: mine:Mine\n"
    )
    (tmp_path / "tune.yaml").write_text("name: t\nrecipe: recipe.yaml\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_only_what_is_named_is_sent(project: Path) -> None:
    bundle = collect(JobConfig(name="j", verb="tune", config="tune.yaml"))
    sent = {"tune.yaml", "recipe.yaml", "data/a.jsonl", "data/b.jsonl", "base/config.json", "mine.py"}
    assert set(bundle.files) == sent
    assert bundle.expected == ["/shared/v.jsonl"]
    bundle.copy_to(project / "copy")
    assert {str(path.relative_to(project / "copy")) for path in (project / "copy").rglob("*.*")} == sent


def test_an_override_names_files_too(project: Path) -> None:
    bundle = collect(
        JobConfig(name="j", config="recipe.yaml", arguments=["data.train=data/other.jsonl", "--resume"])
    )
    assert "data/other.jsonl" in bundle.files and "data/a.jsonl" not in bundle.files


def test_a_working_dir_is_sent_whole_without_secrets(project: Path) -> None:
    job = JobConfig(name="j", config="recipe.yaml", working_dir=".")
    bundle = collect(job)
    assert "runs/old.bin" in bundle.files and ".env" not in bundle.files
    assert command_line(JobConfig(name="j", config=f"{project}/data/a.jsonl", working_dir="data")) == (
        "ftray run a.jsonl"
    )


def test_hidden_files_and_secrets_of_a_folder_stay_here_and_are_named(project: Path) -> None:
    for name in (
        ".env.local",
        ".git/config",
        ".aws/credentials",
        ".config/other",
        "data/.netrc",
        "data/tls.pem",
        "data/Server.KEY",
        "data/id_rsa",
        "venv/bin/python",
        "__pycache__/mine.pyc",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("secret")
    (project / "base" / "notes.txt").symlink_to("../.env")
    job = JobConfig(name="j", config="recipe.yaml", working_dir=".")
    bundle = collect(job)
    assert set(bundle.files) == {
        "recipe.yaml",
        "tune.yaml",
        "mine.py",
        "base/config.json",
        "runs/old.bin",
        *(f"data/{name}.jsonl" for name in ("a", "b", "other")),
    }
    hidden = {".env", ".env.local", ".git", ".aws", ".config", "data/.netrc"}
    assert set(bundle.withheld) == hidden | {
        "data/tls.pem",
        "data/Server.KEY",
        "data/id_rsa",
        "base/notes.txt",
    }


def test_a_link_out_of_the_folder_is_not_followed(project: Path) -> None:
    outside = project.parent / "private.jsonl"
    outside.write_text("private")
    link = project / "base" / "linked.json"
    link.symlink_to(outside)
    for job in ({"config": "recipe.yaml"}, {"config": "recipe.yaml", "working_dir": "."}):
        with pytest.raises(ConfigError, match=r"base/linked\.json lies outside .*; copy the file there"):
            collect(JobConfig(name="j", **job))  # type: ignore[arg-type]
    link.unlink()
    link.symlink_to("config.json")
    assert "base/linked.json" in collect(JobConfig(name="j", config="recipe.yaml")).files


@pytest.mark.parametrize("name", [".env", "data/tls.pem", "data/harmless.txt"])
def test_a_secret_that_is_named_is_refused(project: Path, name: str) -> None:
    (project / "data" / "tls.pem").write_text("secret")
    (project / "data" / "harmless.txt").symlink_to("tls.pem")
    with pytest.raises(ConfigError, match=f"{name}: a secret by its name"):
        collect(JobConfig(name="j", config="recipe.yaml", files=[name]))


def test_a_hidden_file_that_is_named_is_sent(project: Path) -> None:
    (project / ".jobs").mkdir()
    (project / ".jobs" / "r.yaml").write_text((project / "recipe.yaml").read_text())
    for working_dir in ("", "."):
        job = JobConfig(name="j", config=".jobs/r.yaml", working_dir=working_dir)
        assert ".jobs/r.yaml" in collect(job).files


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"config": "missing.yaml"}, "missing.yaml"),
        ({"config": "recipe.yaml", "arguments": ["data.train=data/none.jsonl"]}, "data/none.jsonl"),
        ({"config": "recipe.yaml", "files": ["nothing"]}, "nothing"),
        ({"config": "recipe.yaml", "working_dir": "data"}, "data"),
        ({"config": "recipe.yaml", "working_dir": "nowhere"}, "nowhere"),
        ({"config": "recipe.yaml", "arguments": ["data.train=../outside.jsonl"]}, "outside"),
    ],
)
def test_what_cannot_be_sent_is_one_line(project: Path, job: dict[str, object], message: str) -> None:
    (project.parent / "outside.jsonl").write_text("{}")
    with pytest.raises(FtrayError, match=message) as raised:
        collect(JobConfig(name="j", **job))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_too_much_names_the_largest_file(project: Path) -> None:
    with (project / "base" / "model.safetensors").open("wb") as file:
        file.truncate(2_000_000)
    with pytest.raises(ClusterError, match=r"2 MB to send, more than max_upload_mb=1; .*model\.safetensors"):
        collect(JobConfig(name="j", config="recipe.yaml", max_upload_mb=1))


def test_a_file_may_refer_to_what_only_the_cluster_knows(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONLY_THERE", raising=False)
    (project / "serve.yaml").write_text("base: base\nkey: ${ONLY_THERE}\n")
    assert (
        "base/config.json"
        in collect(JobConfig(name="j", verb="serve", config="serve.yaml", secrets=["ONLY_THERE"])).files
    )
    assert "ONLY_THERE" not in os.environ
    with pytest.raises(ConfigError, match="ONLY_THERE"):
        collect(JobConfig(name="j", verb="serve", config="serve.yaml"))


@pytest.mark.parametrize("nasty", NASTY)
def test_no_value_reaches_the_shell_unquoted(tmp_path: Path, nasty: str) -> None:
    line = command_line(JobConfig(name="j", config=nasty, arguments=[nasty]))
    assert shlex.split(line) == ["ftray", "run", nasty, nasty]
    shown = subprocess.run(
        ["/bin/sh", "-c", line.replace("ftray", "printf '%s\\0'", 1)],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert shown.stdout.decode().split("\0")[1:3] == [nasty, nasty]
    assert not (tmp_path / "pwned").exists()


def test_a_secret_is_demanded_by_name_only(tmp_path: Path) -> None:
    line = command_line(JobConfig(name="j", verb="version", secrets=["MY_TOKEN"]))
    (tmp_path / "ftray").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "ftray").chmod(0o755)

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        return subprocess.run(["/bin/sh", "-c", line], env=path | env, capture_output=True, text=True)

    assert run(MY_TOKEN="x").stdout == "ran\n"
    without = run()
    assert without.returncode != 0 and "MY_TOKEN" in without.stderr and without.stdout == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"env": {"HF_TOKEN": "hf_x"}},
        {"env": {"WANDB_API_KEY": "x"}},
        {"env": {"A B": "x"}},
        {"env": {"DB_PASS": "x"}},
        {"env": {"HF_AUTH": "x"}},
        {"env": {"PGPASSWORD": "x"}},
        {"env": {"ssh_key": "x"}},
        {"arguments": ["tracking.api_key=abc"]},
        {"arguments": ["tracking=[{type: wandb, api_key: abc}]"]},
        {"arguments": ['tracking=[{"type": "wandb", "api_key": "abc"}]']},
        {"arguments": ["--token=abc"]},
        {"arguments": ["--token", "abc"]},
        {"secrets": ["X}; touch pwned; ${Y"]},
        {"name": "../x"},
        {"verb": "rm"},
        {"config": ""},
    ],
)
def test_a_job_that_would_leak_or_break_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse(JobConfig, {"name": "j", "verb": "run", "config": "r.yaml"} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"env": {"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "8", "KEYBOARD": "x", "BYPASS": "1"}},
        {"env": {"SUPPORT_KEY_SHA256": "0" * 64}},
        {"arguments": ["--resume", "data.max_length=9", "data.train=s3://bucket/pass/token.jsonl"]},
        {"arguments": ["optim={type: adamw, learning_rate: 1e-4}", "base=hf://key"]},
    ],
)
def test_what_only_sounds_like_a_secret_is_taken(fields: dict[str, object]) -> None:
    parse(JobConfig, {"name": "j", "verb": "run", "config": "r.yaml"} | fields)


def test_a_secret_in_an_argument_is_not_shown() -> None:
    job = {"name": "j", "verb": "run", "config": "r.yaml", "arguments": ["tracking.api_key=sk-mine"]}
    with pytest.raises(ConfigError, match=r"arguments: tracking\.api_key looks like a secret") as raised:
        parse(JobConfig, job)
    assert "sk-mine" not in str(raised.value)
