"""Models from a stand-in of the Hub, with both major versions of its client: what comes, and what is told if not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_client import CHUNK_BYTES, Client, client
from tests.hub_files import OWNER, STRANGER, Refusal, read
from tests.hub_server import Hub
from tests.tiny import tiny_mistral

NAME = "owner/base"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two trainings of one model."""
    return [tiny_mistral(tmp_path_factory.mktemp("model"), seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    """Return a Hub for this file."""
    with Hub() as hub:
        yield hub
        hub.shutdown()


@pytest.fixture(scope="module", params=[1, 2])
def user(server: Hub, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Client]:
    """Return a client of each major version; its token is never printed."""
    folder = tmp_path_factory.mktemp(f"hub{request.param}")
    with client(server, request.param, folder) as running:
        yield running
    printed = (folder / "errors.txt").read_text()
    assert not any(token in printed for token in (OWNER, STRANGER))


@pytest.fixture
def hub(server: Hub, folders: list[Path]) -> Hub:
    """Return the Hub as new, with one model of two commits."""
    server.reset()
    server.add(NAME, *folders)
    return server


def test_a_branch_is_what_it_points_to_and_a_commit_stays(
    hub: Hub, user: Client, folders: list[Path], tmp_path: Path
) -> None:
    """Where `main` has moved the new files come, those of a pinned commit do not change; nothing comes twice."""
    old, new = hub.repositories[NAME].commits
    first = Path(user.call("resolve", NAME, cache_dir=str(tmp_path)))
    hub.repositories[NAME].branches["main"] = new
    second = Path(user.call("resolve", NAME, cache_dir=str(tmp_path)))
    pinned = Path(user.call("resolve", NAME, cache_dir=str(tmp_path), revision=old))
    assert (first.name, second.name, pinned) == (old, new, first)
    assert [read(first), read(second)] == list(map(read, folders))
    assert hub.asked("GET /cdn/") == 2


def test_a_broken_download_goes_on_where_it_broke_off(
    hub: Hub, user: Client, folders: list[Path], tmp_path: Path
) -> None:
    """With a range, and the whole is what the Hub has, bit for bit."""
    hub.broken_after["model.safetensors"] = 100_000
    found = Path(user.call("resolve", NAME, cache_dir=str(tmp_path)))
    ranges = [request.headers.get("Range", request.headers.get("range")) for request in hub.requests]
    assert [value for value in ranges if value] == [f"bytes={100_000 // CHUNK_BYTES * CHUNK_BYTES}-"]
    assert read(found) == read(folders[0])
    user.call("verify", found)


def test_a_download_that_breaks_off_for_good_is_told_and_can_be_repeated(
    hub: Hub, user: Client, folders: list[Path], tmp_path: Path
) -> None:
    """One sentence; the next try fetches what is missing, and only that."""
    hub.fail("GET /cdn/", 500, times=99)
    told = user.refusal("resolve", NAME, cache_dir=str(tmp_path))
    assert told == f"The Hub is out of order (500), so {NAME} has to wait; try again later."
    hub.faults.clear()
    assert read(Path(user.call("resolve", NAME, cache_dir=str(tmp_path)))) == read(folders[0])
    assert hub.asked(f"GET /{NAME}/resolve/.*/tokenizer.json") == 1


def test_wrong_bits_are_found_and_can_be_fetched_anew(hub: Hub, user: Client, tmp_path: Path) -> None:
    """`verify` names the file, and what to remove; without that the client would not look again."""
    hub.damaged.add("model.safetensors")
    found = Path(user.call("resolve", NAME, cache_dir=str(tmp_path)))
    told = user.refusal("verify", found)
    assert told.startswith(f"{found}/model.safetensors is not what the Hub published (its digest is not ")
    assert f"Remove {(found / 'model.safetensors').resolve()} and download it anew." in told
    hub.damaged.clear()
    (found / "model.safetensors").resolve().unlink()
    user.call("verify", user.call("resolve", NAME, cache_dir=str(tmp_path)))


def test_small_files_are_verified_too(hub: Hub, user: Client, tmp_path: Path) -> None:
    """A template or a configuration that was changed in the cache is found by Git's digest."""
    path = Path(user.call("resolve", NAME, cache_dir=str(tmp_path))) / "tokenizer_config.json"
    user.call("verify", path.parent)
    path.resolve().write_text(path.read_text() + " ")
    assert user.refusal("verify", path.parent).startswith(f"{path} is not what the Hub published")


def test_whoever_may_not_read_is_told_what_to_do(hub: Hub, user: Client, tmp_path: Path) -> None:
    """Gated, private, unknown, and a token that nobody has; the owner gets both."""
    hub.repositories[NAME].gated = True
    hub.add("owner/private", tmp_path, private=True)
    gated = f"{NAME} is gated: accept its terms on its Hub page, then {LOGIN}"
    unknown = "The Hub has no model {!r} that you may read. Check the name; if it is private, " + LOGIN
    for token in (None, STRANGER):
        assert user.refusal("resolve", NAME, cache_dir=str(tmp_path), token=token) == gated
        for name in ("owner/private", "owner/nothing"):
            assert user.refusal("resolve", name, cache_dir=str(tmp_path), token=token) == unknown.format(name)
    bad = user.refusal("resolve", NAME, cache_dir=str(tmp_path), token="hf_" + "0" * 34)
    assert bad == f"The Hub does not know the access token that it was sent for {NAME}; {LOGIN}"
    assert Path(user.call("resolve", NAME, cache_dir=str(tmp_path), token=OWNER)).is_dir()
    assert all("uthorization" not in " ".join(request.headers) for request in hub.requests if "/cdn/" in request.path)


def test_a_revision_or_a_file_that_is_not_there(hub: Hub, user: Client, tmp_path: Path) -> None:
    """Each is told by its name."""
    told = user.refusal("resolve", NAME, cache_dir=str(tmp_path), revision="v9")
    assert told == f"{NAME} has no revision 'v9' on the Hub."
    hub.fail("(GET|HEAD) .*/resolve/.*/config.json", 404, times=99)
    hub.faults[-1].refusal = Refusal(404, "Entry not found", "EntryNotFound")
    told = user.refusal("resolve", NAME, cache_dir=str(tmp_path))
    assert told == f"The Hub lists a file of {NAME} that it does not have (404); try again, or another revision."


def test_a_busy_hub_is_asked_again(hub: Hub, user: Client, folders: list[Path], tmp_path: Path) -> None:
    """After 429 on a file as late as it asks for; where it goes on, and for 500 at the start, that is told."""
    hub.fail("GET /cdn/", 429, **{"Retry-After": "7"})
    assert read(Path(user.call("resolve", NAME, cache_dir=str(tmp_path / "a")))) == read(folders[0])
    assert user.waits == [8.0]
    assert "429" in user.errors.read_text()  # the log, in which no token may be
    hub.fail("GET /cdn/", 429, times=99)
    told = user.refusal("resolve", NAME, cache_dir=str(tmp_path / "b"))
    assert told == f"The Hub takes no more requests for now (429), so {NAME} has to wait; try again in some minutes."
    hub.faults.clear()
    hub.fail("GET /api/models/.*/revision", 500, times=99)
    told = user.refusal("resolve", NAME, cache_dir=str(tmp_path / "c"))
    out_of_order = f"The Hub is out of order (500), so {NAME} has to wait; try again later."
    assert told == f"{out_of_order} The cache does not have it either."


def test_with_all_in_the_cache_no_hub_is_needed(hub: Hub, user: Client, tmp_path: Path) -> None:
    """Where it is out of order, cannot be reached or may not be asked; what is not in the cache is told."""
    found = user.call("resolve", NAME, cache_dir=str(tmp_path))
    hub.fail("GET", 500, times=99)
    assert user.call("resolve", NAME, cache_dir=str(tmp_path)) == found
    major = int(user.call("version")[0])
    if major == 1:  # a process of its own for each kind of absence, so once is enough
        return
    reasons = {
        "HF_ENDPOINT": (
            "http://127.0.0.1:9",
            "The Hub cannot be reached for {} (ConnectError); look at the network, and",
        ),
        "HF_HUB_OFFLINE": ("1", "The Hub may not be asked for {} (HF_HUB_OFFLINE)."),
    }
    for number, (variable, (value, told)) in enumerate(reasons.items()):
        (tmp_path / str(number)).mkdir()
        with client(hub, major, tmp_path / str(number), **{variable: value}) as alone:
            assert alone.call("resolve", NAME, cache_dir=str(tmp_path)) == found
            refused = alone.refusal("resolve", "owner/other", cache_dir=str(tmp_path))
        assert refused.startswith(told.format("owner/other"))
        assert refused.endswith("The cache does not have it either.")
