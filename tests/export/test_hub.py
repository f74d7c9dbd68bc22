"""Uploads to a stand-in of the Hub, with both major versions of its client: what goes up, what stays, what is told."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.export.folders import BASE, adapter, peft, run, weights
from tests.hub_client import Client, client
from tests.hub_files import OWNER, STRANGER, read
from tests.hub_server import Hub

NAME = "owner/tiny-chat"


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    """Return a Hub for this file."""
    with Hub() as hub:
        yield hub
        hub.shutdown()


@pytest.fixture(scope="module", params=[1, 2])
def user(server: Hub, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Client]:
    """Return a client of each major version, without a token; none is ever printed, nor written."""
    folder = tmp_path_factory.mktemp(f"hub{request.param}")
    with client(server, request.param, folder) as running:
        yield running
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file() and "packages" not in path.parts]
    assert not any(token.encode() in text for token in (OWNER, STRANGER) for text in texts)


@pytest.fixture
def hub(server: Hub) -> Hub:
    """Return the Hub as new."""
    server.reset()
    return server


def clutter(folder: Path, outside: Path) -> Path:
    """Put into a folder what must never go up."""
    outside.mkdir()
    (outside / "LICENSE").write_text("somebody else's")
    (folder / "LICENSE").symlink_to(outside / "LICENSE")
    (folder / ".env").write_text("HF_TOKEN=x")
    weights(folder / "optimizer.safetensors")
    weights(folder / "checkpoints" / "adapters.safetensors")
    return folder


def test_an_adapter_goes_up_with_its_card_and_nothing_else(hub: Hub, user: Client, tmp_path: Path) -> None:
    """The files are on the Hub bit for bit, with a card the Hub takes; the rest stays, is told, and is not touched."""
    folder = clutter(run(tmp_path / "run"), tmp_path / "outside")
    before = read(folder)
    upload = user.call("push", folder, NAME, token=OWNER)
    assert upload["url"] == f"{hub.url}/{NAME}/commit/{2:040x}"
    assert upload["left_out"] == [".env", "LICENSE", "checkpoints", "optimizer.safetensors"]
    files = hub.repositories[NAME].at("main")[1]
    assert sorted(files) == [".gitattributes", "README.md", "adapter_config.json", "adapters.safetensors"]
    assert {name: files[name] for name in ("adapter_config.json", "adapters.safetensors")} == {
        name: before[name] for name in ("adapter_config.json", "adapters.safetensors")
    }
    assert files["README.md"].decode() == upload["card"]
    assert ModelCard(upload["card"]).data.base_model == BASE
    assert read(folder) == before
    assert hub.asked("POST /api/validate-yaml")
    sent = [request for request in hub.requests if request.path.startswith("/lfs/")]
    assert len(sent) == 1
    assert "authorization" not in {name.lower() for name in sent[0].headers}


def test_the_same_again_sends_and_commits_nothing(hub: Hub, user: Client, tmp_path: Path) -> None:
    """A push that was broken off, or is repeated, sends what is missing; what is on the Hub besides stays there."""
    folder = adapter(tmp_path / "adapter")
    first = user.call("push", folder, NAME, token=OWNER)
    assert user.call("push", folder, NAME, token=OWNER)["url"] == first["url"]
    assert (hub.asked("PUT /lfs"), hub.asked("POST .*/commit/")) == (1, 1)
    hub.repositories[NAME].commit("main", {**hub.repositories[NAME].at("main")[1], "notes.md": b"by hand"})
    user.call("push", adapter(tmp_path / "adapter", num_layers=2), NAME, token=OWNER, message="More layers")
    files = hub.repositories[NAME].at("main")[1]
    assert (hub.asked("PUT /lfs"), files["notes.md"]) == (1, b"by hand")
    assert json.loads(files["adapter_config.json"])["num_layers"] == 2
    assert hub.repositories[NAME].summaries == ["Upload mlx-lm adapter with mlx-trainer", "More layers"]


def test_a_large_file_goes_in_parts(hub: Hub, user: Client, tmp_path: Path) -> None:
    """As many as the Hub asks for, one file in the end."""
    hub.part_bytes = 100
    folder = adapter(tmp_path / "adapter")
    user.call("push", folder, NAME, token=OWNER)
    content = (folder / "adapters.safetensors").read_bytes()
    assert hub.asked("PUT /lfs/.*/") == -(-len(content) // 100) > 1
    assert hub.repositories[NAME].at("main")[1]["adapters.safetensors"] == content


def test_a_dry_run_asks_nobody_and_says_what_goes_up(hub: Hub, user: Client, tmp_path: Path) -> None:
    """Without a token; sizes, card and notes are those of the push that follows it."""
    folder = run(tmp_path / "run")
    planned = user.call("push", folder, NAME, dry_run=True, license="mit")
    assert hub.requests == []
    assert planned["url"] is None
    done = user.call("push", folder, NAME, token=OWNER, license="mit")
    assert planned | {"url": done["url"]} == done
    sent = hub.repositories[NAME].at("main")[1]
    assert planned["files"] == {name: len(sent[name]) for name in sorted(sent) if name != ".gitattributes"}


def test_the_license_is_the_bases(hub: Hub, user: Client, tmp_path: Path) -> None:
    """Where its card on the Hub names one; what was given wins, and where there is none that is told."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    folder = adapter(tmp_path / "adapter")
    untold = user.call("push", folder, NAME, token=OWNER)
    assert [note for note in untold["notes"] if "license" in note] == ["the card names no license: give --license"]
    hub.add(BASE, tmp_path / "base")
    licenses = [
        ModelCard(user.call("push", folder, NAME, token=OWNER, **given)["card"]).data.license
        for given in ({}, {"license": "mit"})
    ]
    assert licenses == ["apache-2.0", "mit"]


def test_private_is_private(hub: Hub, user: Client, tmp_path: Path) -> None:
    """A new repository is made private; one that is public already gets nothing."""
    folder = adapter(tmp_path / "adapter")
    user.call("push", folder, NAME, token=OWNER, private=True)
    assert hub.repositories[NAME].private
    user.call("push", folder, "owner/public", token=OWNER)
    assert not hub.repositories["owner/public"].private
    refused = user.refusal("push", folder, "owner/public", token=OWNER, private=True)
    assert refused == "owner/public is there already, and public; make it private on its Hub page first."
    assert len(hub.repositories["owner/public"].commits) == 2


def test_a_branch_is_made(hub: Hub, user: Client, tmp_path: Path) -> None:
    """`revision` gets the files, `main` stays as it is."""
    user.call("push", adapter(tmp_path / "adapter"), NAME, token=OWNER, revision="v2")
    repository = hub.repositories[NAME]
    assert ("adapters.safetensors" in repository.at("v2")[1], list(repository.at("main")[1])) == (
        True,
        [".gitattributes"],
    )


def test_other_weights_on_the_hub_are_not_mixed_with_these(hub: Hub, user: Client, tmp_path: Path) -> None:
    """A PEFT adapter would lose its configuration to mlx-lm's, old shards would be loaded with new ones."""
    user.call("push", peft(tmp_path / "peft"), NAME, token=OWNER)
    refused = user.refusal("push", adapter(tmp_path / "adapter"), NAME, token=OWNER)
    assert refused.startswith(f"{NAME} (main) holds other weights, adapter_model.safetensors, which would stay beside")
    assert len(hub.repositories[NAME].commits) == 2


def test_what_the_hub_keeps_is_compared_with_what_was_sent(hub: Hub, user: Client, tmp_path: Path) -> None:
    """A bit that is wrong over there is found."""
    hub.damaged.add("adapters.safetensors")
    refused = user.refusal("push", adapter(tmp_path / "adapter"), NAME, token=OWNER)
    assert refused == f"{NAME} holds something else than was sent for adapters.safetensors; push again."


def test_a_busy_hub_is_asked_again(hub: Hub, user: Client, tmp_path: Path) -> None:
    """After 429 as late as it asks for, after 500 soon; nobody is told of it but the log."""
    hub.fail("POST .*/preupload/", 429, **{"Retry-After": "7"})
    hub.fail("PUT /lfs", 500)
    user.call("push", adapter(tmp_path / "adapter"), NAME, token=OWNER)
    assert (user.waits, hub.asked("PUT /lfs")) == ([8.0, 1], 2)
    assert "429" in user.errors.read_text()  # the log, in which no token may be


@pytest.mark.parametrize(
    ("pattern", "status", "told"),
    [
        (
            "POST .*/preupload/",
            429,
            "The Hub takes no more requests for now (429), so {} has to wait; try again in some",
        ),
        ("PUT /lfs", 503, "The Hub is out of order (503), so {} has to wait; try again later."),
        ("POST /api/repos/create", 500, "The Hub is out of order (500), so {} has to wait; try again later."),
        ("POST .*/commit/", 412, "{} was changed while it was written to; try again."),
        ("POST .*/commit/", 418, "{}: the Hub refused with 418: "),
    ],
)
def test_an_answer_that_is_none_is_one_sentence(
    hub: Hub, user: Client, tmp_path: Path, pattern: str, status: int, told: str
) -> None:
    """After the retries, and nothing is committed."""
    hub.fail(pattern, status, times=99)
    refused = user.refusal("push", adapter(tmp_path / "adapter"), NAME, token=OWNER)
    assert refused.startswith(told.format(NAME))
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


def test_a_card_that_the_hub_refuses_is_told(hub: Hub, user: Client, tmp_path: Path) -> None:
    """With the Hub's reason; nothing is committed."""
    hub.refused_cards["license"] = "unheard-of"
    refused = user.refusal("push", adapter(tmp_path / "adapter"), NAME, token=OWNER, license="unheard-of")
    assert refused == f'{NAME}: Invalid metadata in README.md. - "license" must not be unheard-of'
    assert len(hub.repositories[NAME].commits) == 1


def test_whoever_may_not_write_is_told_what_to_do(hub: Hub, user: Client, tmp_path: Path) -> None:
    """Without a token nobody is asked; one that is unknown, and one of somebody else, are told apart."""
    folder = adapter(tmp_path / "adapter")
    login = "log in with `hf auth login`, or set HF_TOKEN."
    none = user.refusal("push", folder, NAME)
    assert none == f"Uploading to {NAME} needs an access token that may write: {login}"
    assert hub.asked("POST") == 0
    unknown = user.refusal("push", folder, NAME, token="hf_" + "0" * 34)
    assert unknown == f"The Hub does not know the access token that it was sent for {NAME}; {login}"
    other = user.refusal("push", folder, NAME, token=STRANGER)
    assert other == f"The access token may not do this with {NAME}: use one of a member, with the right to write."
    assert hub.repositories == {}


def test_the_way_that_xet_goes(hub: Hub, tmp_path: Path) -> None:
    """2.x uploads otherwise where Xet is on; the stand-in has no Xet storage, so every file goes in the commit."""
    hub.large_objects = False
    folder = adapter(tmp_path / "adapter")
    with client(hub, 2, tmp_path, HF_HUB_DISABLE_XET="0") as user:
        user.call("push", folder, NAME, token=OWNER)
        assert hub.asked("POST /api/validate-yaml") == 1  # the other way asks twice
        files = hub.repositories[NAME].at("main")[1]
        assert files["adapters.safetensors"] == (folder / "adapters.safetensors").read_bytes()
        assert hub.asked("POST .*/batch") == 0
        hub.fail("POST .*/preupload/", 403)
        refused = user.refusal("push", folder, NAME, token=OWNER)
    assert refused.startswith(f"The access token may not do this with {NAME}")


def test_what_was_pushed_can_be_had(hub: Hub, tmp_path: Path) -> None:
    """The command fetches an adapter at a commit, compares it, and prints the folder, as `--adapter` takes it."""
    folder = adapter(tmp_path / "adapter")
    command = [sys.executable, "-m", "mlx_trainer", "download", NAME, "--cache-dir", str(tmp_path / "cache")]
    environment = {**os.environ, **hub.environment(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    with client(hub, 2, tmp_path) as user:
        commit = user.call("push", folder, NAME, token=OWNER)["url"].split("/")[-1]
    adapter(folder, num_layers=2)
    hub.repositories[NAME].commit("main", read(folder))
    done = subprocess.run([*command, "--revision", commit], env=environment, capture_output=True, text=True, check=True)
    found = Path(done.stdout.strip())
    assert found.name == commit
    assert json.loads((found / "adapter_config.json").read_text())["num_layers"] == 1
    assert (found / "adapters.safetensors").read_bytes() == (folder / "adapters.safetensors").read_bytes()
    (found / "adapters.safetensors").resolve().write_bytes(b"other")
    done = subprocess.run(
        [*command, "--revision", commit], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "adapters.safetensors is not what the Hub published" in done.stderr


def test_without_a_network(server: Hub, tmp_path: Path) -> None:
    """That is told, after the client's retries."""
    with client(server, 2, tmp_path, HF_ENDPOINT="http://127.0.0.1:9") as user:
        refused = user.refusal("push", adapter(tmp_path / "adapter"), NAME, token=OWNER)
    assert refused == f"The Hub cannot be reached for {NAME} (ConnectError); look at the network, and try again."
