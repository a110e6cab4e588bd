"""What `.comfyignore` leaves of the repository is all that a user's ComfyUI needs, and little more."""

import shutil
import subprocess

import pytest

from medsteer_core.run.client import ComfyClient
from medsteer_core.run.server import ComfyServer, comfyui_from_environment

MOST_BYTES = 22 * 10**6  # 17.5 MB of it are EndoPhantom's weights
NEVER = ("tests/", "benchmarks/", ".ci/", ".github/", "output/", "dev.py")
ALWAYS = ("__init__.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "example_workflows/", "web/docs/",
          "medsteer_core/endophantom/weights/", "nodes/")  # fmt: skip


@pytest.fixture(scope="module")
def archived(checkout):
    """The files of the archive, as the publisher's tool picks them: committed or about to be, and not ignored."""

    if not (checkout / ".git").exists():
        pytest.skip("no git clone: which files belong to the repository is not known")

    def listed(*options):
        command = ["git", "-C", str(checkout), "ls-files", *options]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())

    ignoring = "-i", "-X", str(checkout / ".comfyignore")  # of one kind of files at a time
    picked = listed("-co", "--exclude-standard") - listed("-c", *ignoring) - listed("-o", *ignoring)
    return sorted(name for name in picked if (checkout / name).is_file())


def test_it_is_small_and_has_no_part_that_only_developers_need(checkout, archived):
    assert not [name for name in archived if name.startswith(NEVER)]
    assert all(any(name.startswith(part) for name in archived) for part in ALWAYS)
    assert sum((checkout / name).stat().st_size for name in archived) < MOST_BYTES


def test_its_python_sources_hold_only_characters_of_windows_code_page(checkout, archived):
    """comfy-test refuses others: tools that read a file in Windows' code page 1252 fail at them."""

    def strange(name):
        text = (checkout / name).read_text(encoding="utf-8")
        return sorted(set(text) - set(text.encode("cp1252", "ignore").decode("cp1252")))

    sources = [name for name in archived if name.endswith(".py")]
    assert len(sources) > 100
    assert {name: strange(name) for name in sources if strange(name)} == {}


def test_comfyui_loads_it_whole(checkout, archived, comfy, tmp_path):
    for name in archived:
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, tmp_path / "pack" / name)
    with ComfyServer(comfyui_from_environment(), tmp_path / "pack", cpu=True) as server:
        there = ComfyClient(server.address).object_info()
    ours = {name for name in comfy.object_info() if name.startswith("MedSteer_")}
    assert ours and ours == {name for name in there if name.startswith("MedSteer_")}
