"""What Counterfactual Sampler writes down of its pairs: enough to make them again, the same wherever they are made."""

import json
import time

import pytest
import tiny
import torch
from comfy_extras.nodes_custom_sampler import Noise_EmptyNoise, Noise_RandomNoise
from medsteer_pack.medsteer_core.dataset.records import finish
from medsteer_pack.medsteer_core.host.patching import levels
from medsteer_pack.medsteer_core.host.patching.fingerprint import fingerprint
from medsteer_pack.medsteer_core.host.sampling import counterfactual
from medsteer_pack.medsteer_core.host.sampling import runs as sampling
from medsteer_pack.medsteer_core.host.sampling.pair_record import tensor_hash
from medsteer_pack.medsteer_core.steering.operators import Operator

POSITIVE, NEGATIVE = tiny.cond(1), tiny.cond(0, tokens=3)


@pytest.fixture(scope="module")
def model(pixart):
    return tiny.steered(pixart, tiny.vector(pixart), operator="suppress", start=0.3, strength=2.0, keep_norm=True)


def run(model, *, sampler="euler", steps=4, **changes):
    fields = {
        "positive": POSITIVE, "negative": NEGATIVE, "latent": tiny.latent(), "seed": 7, "cfg": 4.0,
        "schedule": sampling.schedule(model, steps, sampler, "normal"), "texts": {"positive": "polyps", "negative": ""},
        **changes,
    }  # fmt: skip
    return counterfactual.sample_pair(model, counterfactual.PairRequest(**fields))


def record(model, **changes) -> dict:
    """The one record of a run of one pair."""
    (found,) = run(model, **changes).records
    return found


def pair_id(started: dict) -> str:
    return finish(started, source="polyps", target="normal cecum", split="train")["pair_id"]


def test_a_record_holds_what_makes_the_pair_again(model, pixart):
    made = record(model)["made"]
    assert made["model"] == fingerprint(pixart)
    assert made["prompts"]["positive"]["text"] == "polyps" and len(made["prompts"]["negative"]["sha256"]) == 64
    kept = ("seed", "batch_index", "latent_shape", "noise", "sampler", "scheduler", "steps", "cfg", "multiple")
    assert {name: made[name] for name in kept} == {
        "seed": 7, "batch_index": 0, "latent_shape": [1, 4, 8, 8], "noise": "seed", "sampler": "euler",
        "scheduler": "normal", "steps": 4, "cfg": 4.0, "multiple": 1.0,
    }  # fmt: skip
    assert made["sigmas"] == tensor_hash(sampling.schedule(pixart, 4, "euler", "normal").sigmas)
    assert made["lock"] == {"mask_source": "none"}
    (steering,) = made["steering"]
    vector = tiny.vector(pixart)
    assert steering["vector"]["sha256"] == vector.content_hash() and steering["vector"]["vector"] == vector.short_hash()
    assert steering["vector"]["made"] == dict(vector.provenance)
    assert steering["sites"] == list(vector.site_names) and steering["rows"] == "all"
    window = levels.window(pixart, 0.3, 1.0)
    assert steering["window"] == [window.start_sigma, window.end_sigma]
    operator = {"name": steering["operator"], "strength": steering["strength"], **steering["parameters"]}
    assert Operator.from_dict(operator).to_dict() == {
        "name": "suppress", "strength": 2.0, "keep_norm": True,
    }  # fmt: skip
    assert json.loads(json.dumps(made)) == made


def test_the_record_of_a_run_is_always_the_same_and_leaves_the_images_alone(model, monkeypatch):
    first, second = run(model), run(model)
    assert first.records == second.records
    monkeypatch.setattr(counterfactual, "records_of", lambda *_: [])
    bare = run(model)
    assert torch.equal(bare.factual, first.factual) and torch.equal(bare.counterfactual, first.counterfactual)


def test_records_come_in_the_order_of_the_images(model):
    found = run(model, latent=tiny.latent(batch=2), multiples=(0.0, 1.0))
    facts = [(r["made"]["batch_index"], r["made"]["multiple"], r["changes_nothing"]) for r in found.records]
    assert facts == [(0, 0.0, True), (1, 0.0, True), (0, 1.0, False), (1, 1.0, False)]
    assert len(found.records) == len(found.counterfactual)
    groups = [r["group_id"] for r in found.records]
    assert groups[0] == groups[2] != groups[1] == groups[3]


def test_an_image_alone_and_in_a_batch_is_one_pair(model):
    batch = run(model, latent=tiny.latent(batch=3)).records
    alone = [record(model, latent=tiny.latent(batch_index=[i])) for i in range(3)]
    assert [pair_id(r) for r in batch] == [pair_id(r) for r in alone]
    # A sampler that draws noise as it goes draws for the whole batch: another pair, of the same group.
    batch = run(model, sampler="euler_ancestral", latent=tiny.latent(batch=3)).records
    alone = record(model, sampler="euler_ancestral")
    assert batch[0]["made"]["images_at_once"] == 3 and pair_id(batch[0]) != pair_id(alone)
    assert batch[0]["group_id"] == alone["group_id"]


def test_whatever_changes_the_pair_changes_its_id_and_only_the_noise_its_group(model, pixart):
    base = record(model)
    other_vector = tiny.steered(pixart, tiny.vector(pixart, seed=3), operator="suppress", start=0.3)
    masked = torch.zeros(1, 64, 64)
    masked[:, :32] = 1
    same_noise = [
        record(model, cfg=5.0), record(model, positive=tiny.cond(2)), record(model, multiples=(0.5,)),
        record(model, steps=5), record(model, sampler="heun"), record(other_vector),
        record(tiny.steered(pixart, tiny.vector(pixart), operator="suppress", start=0.3, rows="positive")),
        record(tiny.steered(pixart, tiny.vector(pixart), operator="suppress", start=0.4)),
        record(tiny.steered(model, tiny.vector(pixart, seed=4))),
        record(model, mask=masked), record(model, lock="concept map"), record(model, lock="concept map", threshold=0.3),
    ]  # fmt: skip
    other_noise = [record(model, seed=8), record(model, latent=tiny.latent(batch_index=[1])),
                   record(model, latent=tiny.latent(height=10))]  # fmt: skip
    ids = [pair_id(r) for r in (base, *same_noise, *other_noise)]
    assert len(set(ids)) == len(ids)
    assert {r["group_id"] for r in same_noise} == {base["group_id"]}
    assert len({r["group_id"] for r in (base, *other_noise)}) == 4


def test_a_lora_changes_the_models_hash(model, pixart):
    patched = pixart.clone()
    weight = pixart.model.diffusion_model.blocks[0].mlp.fc1.weight
    patched.add_patches({"diffusion_model.blocks.0.mlp.fc1.weight": (torch.ones_like(weight),)}, 0.1)
    steered = tiny.steered(patched, tiny.vector(pixart), operator="suppress", start=0.3)
    facts, base = record(steered)["made"]["model"], record(model)["made"]["model"]
    assert facts["weights"] == base["weights"] and facts["patches"] and not base["patches"]


def test_another_patch_on_the_model_is_named(model):
    other = model.clone()
    other.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
    assert record(other)["made"]["model"]["also"] == ["option patches"]
    assert "also" not in record(model)["made"]["model"]


def test_a_noise_input_of_a_seed_is_that_seeds_and_another_is_told_by_its_values(model):
    assert record(model, seed=1, noise=Noise_RandomNoise(7)) == record(model, seed=7)

    class Doubled(Noise_RandomNoise):
        def generate_noise(self, latent):
            return super().generate_noise(latent) * 2

    doubled = record(model, noise=Doubled(7))
    assert doubled["made"]["noise"].startswith("Doubled ") and doubled["group_id"] != record(model)["group_id"]


def test_pairs_from_one_image_are_a_group_whatever_their_seeds_are(model):
    def start(seed):
        return {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))}

    first, second, other = (record(model, latent=start(a), seed=b) for a, b in ((1, 7), (1, 8), (2, 7)))
    assert first["group_id"] == second["group_id"] != other["group_id"]
    assert first["noise_id"] == other["noise_id"] != second["noise_id"]
    still = record(model, latent=start(1), noise=Noise_EmptyNoise())
    assert still["group_id"] == still["noise_id"] == first["group_id"]  # no noise, so none is shared


def test_the_mask_that_locks_is_told_by_its_source(model):
    masked = torch.zeros(1, 64, 64)
    masked[:, 8:40, 8:40] = 1
    lock = record(model, mask=masked)["made"]["lock"]
    assert lock["mask_source"] == "user" and len(lock["mask"]) == 16
    assert record(model, lock="concept map", dilation=2)["made"]["lock"] == {
        "mask_source": "concept map", "threshold": 0.2, "dilation": 2,
    }  # fmt: skip


def test_hashing_the_models_weights_for_the_record_costs_little(endophantom):
    """32 values of each weight are read: 3 ms of the 0.6 s that a pair of 20 steps takes on two cores."""
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        fingerprint(endophantom[0])
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.03
