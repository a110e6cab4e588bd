"""The training scripts at toy size: files, resume, and that a loss falls."""

import random

import pytest
import torch

from medsteer_core.endophantom import text
from medsteer_core.endophantom.phantom import CLASSES
from medsteer_core.endophantom.pixart_twin import PixArtConfig, PixArtTwin
from medsteer_core.endophantom.train import augment, data, files, generator

SMALL = PixArtConfig(in_channels=4, hidden_size=32, depth=1, num_heads=2, caption_channels=32)


@pytest.fixture
def shards(tmp_path):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (64,), generator=draw).to(torch.uint8)
    latents = (labels.view(-1, 1, 1, 1) / 4 - 1) * torch.ones(64, 4, 8, 8)
    files.save_atomic({"latents": latents.half(), "labels": labels}, tmp_path / "latents_0000.pt")
    return tmp_path


def train(folder, steps):
    generator.run(folder, steps, batch=16, rate=3e-3, seed=0, device="cpu", config=SMALL)


def test_training_lowers_the_loss_and_resumes_from_its_checkpoint(shards, capsys):
    train(shards, 100)
    first = capsys.readouterr().out
    train(shards, 200)
    second = capsys.readouterr().out
    assert "from step 0" in first and "from step 100" in second
    loss = [float(out.split("loss ")[1].split()[0]) for out in (first, second)]
    assert loss[1] < loss[0] < 1.0
    phases = [{"from_step": 0, "confounding": 0.0}, {"from_step": 100, "confounding": 0.0}]
    assert generator.load_trained(shards)[1] == {"steps": 200, "phases": phases}


def test_a_run_without_data_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the `data` step first"):
        train(tmp_path, 1)


def test_data_writes_shards_of_the_phantoms_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 64)
    monkeypatch.setattr(data.components, "__defaults__", (6, 64))
    data.run(tmp_path, 128, channels=6)
    assert [path.name for path in files.shards(tmp_path)] == ["latents_0000.pt", "latents_0001.pt"]
    shard = files.load(tmp_path / "latents_0001.pt")
    assert shard["latents"].shape == (64, 6, 16, 16) and shard["labels"].shape == (64,)
    image, _, labels = data.render_batch(64, data.DATA_SEED + 64)
    assert torch.equal(shard["labels"], labels.to(torch.uint8))
    with torch.no_grad():
        latents = data.load_encoder(tmp_path).encode(image * 2 - 1)
    torch.testing.assert_close(shard["latents"].float(), latents, rtol=0, atol=2e-2)


def test_prompts_hold_the_class_words_in_any_order_and_are_sometimes_empty():
    chooser = random.Random(0)
    prompts = [generator.prompt_tokens(0, chooser) for _ in range(400)]
    wanted = set(text.word_ids(CLASSES[0]))
    empty = sum(prompt == text.tokenize("") for prompt in prompts)
    assert 20 <= empty <= 65
    assert all(wanted <= set(prompt) for prompt in prompts if len(prompt) > 1)
    assert len({tuple(prompt) for prompt in prompts}) > 20


def test_padded_text_does_not_change_the_twins_output():
    torch.manual_seed(0)
    model = PixArtTwin(SMALL).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 3, 32)
    padded = torch.cat([y, torch.randn(1, 2, 32)], dim=1)
    mask = torch.tensor([[True, True, True, False, False]])
    with torch.no_grad():
        assert torch.allclose(model(x, t, y), model(x, t, padded, mask), atol=1e-5)


def test_the_schedule_of_the_learning_rate_warms_up_and_ends_low():
    rates = [generator.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == 0.01 and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_distortion_keeps_shape_and_range_and_changes_the_image():
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    out = augment.distort(images, torch.Generator().manual_seed(2))
    assert out.shape == images.shape and 0 <= float(out.min()) and float(out.max()) <= 1
    assert ((out - images).abs().mean((1, 2, 3)) > 1e-3).all()


def test_nonsense_is_made_of_every_kind_and_stays_in_range():
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    out = augment.nonsense(images, torch.Generator().manual_seed(3))
    assert out.shape == images.shape and 0 <= float(out.min()) and float(out.max()) <= 1
    flat = (out.std((2, 3)).mean(1) < 0.04).sum()
    assert 1 <= flat < 40
