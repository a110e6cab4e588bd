"""LPIPS from a file that is there: no test downloads anything, so the weights here are random."""

import pytest
import torch

from medsteer_core.scores.lpips import WEIGHTS, load_lpips


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """torch's folder of weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def pictures():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_without_weights_nothing_is_downloaded_and_the_message_says_what_to_do(checkpoints, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_args, **_more: pytest.fail("a download"))
    measure, words = load_lpips()
    assert measure is None and WEIGHTS in words and "weights='DEFAULT'" in words and "\n" not in words
    assert not list(checkpoints.iterdir())


def test_with_weights_it_is_torchmetrics_own_number(checkpoints, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    # AlexNet's classifier, which LPIPS does not use, is 59 million numbers: they are not drawn
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).state_dict()
    # ... and saved as one number each
    small = {n: v.flatten()[:1].clone().expand(v.shape) if n.startswith("classifier") else v for n, v in state.items()}
    torch.save(small, checkpoints / WEIGHTS)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_args, **_more: pytest.fail("a download"))
    measure, words = load_lpips()
    assert words == "" and len(measure.weights) == 64
    a, b = pictures()
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as reference

    wanted = reference(a[None], b[None], net_type="alex", normalize=True).item()
    assert wanted > 0 and measure(a, b) == pytest.approx(wanted, rel=1e-6)
    assert measure(a, a) == 0 and measure(a, b) == pytest.approx(wanted, rel=1e-6)  # nothing is carried over
    assert measure(a[:, :20], b[:, :20]) is None  # too small for AlexNet


@pytest.mark.parametrize(
    "content", [b"", b"no weights", b"cos\nsystem\n(S'exit 3'\ntR."], ids=["empty", "text", "code"]
)
def test_a_file_that_holds_no_weights_is_named_and_never_run(checkpoints, content):
    (checkpoints / WEIGHTS).write_bytes(content)
    measure, words = load_lpips()
    assert measure is None and f"{WEIGHTS} is not a readable weights file" in words and "\n" not in words


def test_weights_of_another_network_are_told(checkpoints):
    pytest.importorskip("torchvision")
    torch.save({"weight": torch.zeros(3)}, checkpoints / WEIGHTS)
    measure, words = load_lpips()
    assert measure is None and "does not fit AlexNet" in words
