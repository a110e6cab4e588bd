"""What a PEFT folder says, and what of it is refused. Parity with peft is measured inside ComfyUI's tests."""

import json
import math

import pytest
import torch
from safetensors.torch import save, save_file

from medsteer_core.checkpoints.peft_lora import CONFIG_FILE, HEEDED, REFUSED, WEIGHTS_FILE, pattern_value, read
from medsteer_core.checkpoints.peft_patterns import Clock
from medsteer_core.errors import MedSteerError

NAME = "transformer_blocks.0.attn1.to_q"
CLOCK = Clock(CONFIG_FILE)
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["to_q"], "bias": "none"}


def tensors(name=NAME, rank=4, inputs=8, outputs=6, form="base_model.model.{}.lora_{}.weight"):
    generator = torch.Generator().manual_seed(0)
    return {
        form.format(name, "A"): torch.randn(rank, inputs, generator=generator),
        form.format(name, "B"): torch.randn(outputs, rank, generator=generator),
    }


@pytest.fixture
def write(tmp_path):
    """Write a PEFT folder. Options that are given replace CONFIG's."""

    def folder(values=None, config=None, **options):
        save_file(tensors() if values is None else values, tmp_path / WEIGHTS_FILE)
        (tmp_path / CONFIG_FILE).write_text(json.dumps({**CONFIG, **options} if config is None else config))
        return tmp_path

    return folder


def refused(folder, match):
    with pytest.raises(MedSteerError, match=match) as error:
        read(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


# What is read


@pytest.mark.parametrize(
    "form",
    ["base_model.model.{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight", "{}.lora_{}.weight"],
)
def test_modules_go_by_the_trained_models_names(write, form):
    lora = read(write(tensors(form=form)))
    assert list(lora.modules) == [NAME] and lora.unexpected == ()
    module = lora.modules[NAME]
    assert module.rank == 4 and module.shape == (6, 8)
    assert torch.equal(module.down, tensors(form=form)[form.format(NAME, "A")])


def test_a_convolution_keeps_its_kernel(write):
    name = "base_model.model.pos_embed.proj"
    values = {f"{name}.lora_A.weight": torch.ones(4, 3, 2, 2), f"{name}.lora_B.weight": torch.ones(6, 4, 1, 1)}
    assert read(write(values)).modules["pos_embed.proj"].shape == (6, 3, 2, 2)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 6 / 4),
        ({"lora_alpha": 0.5}, 0.5 / 4),
        ({"lora_alpha": 0}, 0.0),
        ({"use_rslora": True}, 6 / math.sqrt(4)),
        ({"use_rslora": None, "rank_pattern": None, "alpha_pattern": None}, 6 / 4),
        ({"r": 99, "rank_pattern": {"to_q": 4}}, 6 / 4),
        ({"alpha_pattern": {"to_q": 10}}, 10 / 4),
        ({"use_rslora": True, "r": 1, "rank_pattern": {"attn1.to_q": 4}, "alpha_pattern": {"to_q": 3}}, 3 / 2),
    ],
)
def test_the_scale_is_alpha_over_rank_or_over_its_root(write, options, scale):
    assert read(write(**options)).modules[NAME].scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("to_q", True),
        ("attn1.to_q", True),
        (NAME, True),
        (f"^{NAME}", True),
        (r".*\.0\..*", True),
        (r"transformer_blocks\.\d+\.attn[12]\.to_q", True),
        ("attn2.to_q|attn1.to_q", True),
        ("q", False),  # not the whole of a name behind a dot
        ("o_q", False),
        ("attn1", False),  # not up to the end
        ("^attn1.to_q", False),
        ("blocks.0.attn1.to_q", False),
    ],
)
def test_a_pattern_matches_whole_names_behind_a_dot(pattern, matches):
    assert pattern_value({pattern: "special"}, NAME, "default", CLOCK) == ("special" if matches else "default")


def test_the_first_pattern_that_matches_counts():
    assert pattern_value({"to_k": 1, "to_q": 2, "attn1.to_q": 3}, NAME, 0, CLOCK) == 2


@pytest.mark.parametrize(
    "pattern", ["to_q", "q", "o_q", "^attn1.to_q", r".*\.0\..*", "attn1", "a|attn1.to_q", f"^{NAME}"]
)
def test_patterns_match_as_pefts_own_rule_does(pattern):
    other = pytest.importorskip("peft.utils.other")
    key = other.get_pattern_key([pattern], NAME)
    assert pattern_value({pattern: "special"}, NAME, "default", CLOCK) == {pattern: "special"}.get(key, "default")


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, ["blocks.1.to_q"]),
        ({"target_modules": ["to_q", "to_k"]}, ["blocks.1.to_q", "blocks.0.to_k"]),
        ({"target_modules": r"blocks\.\d\.to_[qk]"}, ["blocks.1.to_q", "blocks.0.to_k"]),
        ({"target_modules": ["to_q", "to_k"], "exclude_modules": ["to_k"]}, ["blocks.1.to_q"]),
        ({"target_modules": ["to_q", "to_k"], "exclude_modules": r".*\.1\..*"}, ["blocks.0.to_k"]),
        ({"layers_to_transform": [0]}, []),
        ({"target_modules": "all-linear"}, []),
        ({"target_modules": None}, []),
    ],
)
def test_missing_are_the_modules_that_the_config_trains_and_the_file_lacks(write, options, missing):
    lora = read(write(tensors("blocks.0.to_q"), **options))
    assert lora.missing(["blocks.0.to_q", "blocks.1.to_q", "blocks.0.to_k", "proj_out"]) == missing


def test_tensors_that_are_no_lora_and_options_that_nobody_knows_are_named(write):
    lora = read(write({**tensors(), "base_model.model.shared.weight": torch.ones(2)}, use_magic=True, use_none=None))
    assert lora.unexpected == ("base_model.model.shared.weight",)
    assert lora.ignored_options == ["use_magic"]


def test_every_option_of_peft_is_either_heeded_or_refused():
    peft = pytest.importorskip("peft")
    assert set(peft.LoraConfig().to_dict()) <= {*HEEDED, *REFUSED}


# What is refused


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["proj_out"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts"]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"n": 1}),
    ],
)
def test_an_option_that_makes_more_than_a_lora_is_refused_by_name(write, option, value):
    assert read(write(**{option: None})).modules
    refused(write(**{option: value}), f"uses {option} = .*can't be applied exactly. Merge it into the model with peft")


@pytest.mark.parametrize("kind", ["LOHA", "ADALORA", None, 7, ["LORA"]])
def test_another_kind_of_adapter_is_refused(write, kind):
    refused(write(peft_type=kind), "has peft_type = .*; only 'LORA' can be applied")


@pytest.mark.parametrize("bias", ["all", "lora_only", True])
def test_trained_biases_are_refused(write, bias):
    refused(write(bias=bias), "has bias = .*bias 'none' was expected")


@pytest.mark.parametrize(
    "initial", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new", [1]]
)
def test_an_initialisation_that_changes_the_base_is_refused(write, initial):
    refused(write(init_lora_weights=initial), "has init_lora_weights = .*path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("initial", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_of_the_lora_alone_is_taken(write, initial):
    assert read(write(init_lora_weights=initial)).modules


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("lora_magnitude_vector", "use_dora"),
        ("lora_magnitude_vector.default.weight", "use_dora"),
        ("lora_embedding_A", "LoRA of an embedding"),
        ("lora_embedding_B.default", "LoRA of an embedding"),
        ("lora_B.bias", "lora_bias"),
        ("lora_B.default.bias", "lora_bias"),
        ("modules_to_save.default.weight", "modules_to_save"),
        ("lora_diag.default", "kasa_config"),
    ],
)
def test_tensors_of_a_refused_option_are_refused_whatever_the_config_says(write, key, option):
    values = {**tensors(), f"base_model.model.{NAME}.{key}": torch.ones(4)}
    refused(write(values), f"holds 'base_model.model.{NAME}.{key}', which is {option}")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", None), ("r", "4"), ("r", 4.0), ("r", True), ("r", 0), ("r", -4), ("r", [4]), ("r", 10**40),
        ("lora_alpha", None), ("lora_alpha", "6"), ("lora_alpha", True), ("lora_alpha", {}), ("lora_alpha", 10**400),
        ("lora_alpha", math.nan), ("lora_alpha", math.inf),
        ("use_rslora", "false"), ("use_rslora", [1]),
        ("rank_pattern", [4]), ("rank_pattern", "to_q"), ("rank_pattern", {"to_q": "4"}), ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"(?i)to_q": 4}), ("rank_pattern", {"a)(b": 4, "to_q": None}),
        ("alpha_pattern", {"to_q": None}), ("alpha_pattern", {"to_q": math.nan}), ("alpha_pattern", {"*": 4}),
        ("target_modules", 3), ("target_modules", [3]), ("target_modules", "("), ("exclude_modules", {"a": 1}),
    ],
)  # fmt: skip
def test_an_option_of_a_wrong_type_is_refused_by_name(write, option, value):
    refused(write(**{option: value}), f"has {option} = .*was expected. Download or save the LoRA again")


@pytest.mark.parametrize("options", [{"r": 8}, {"r": 2**30}, {"rank_pattern": {"to_q": 3}}])
def test_a_rank_that_is_not_the_tensors_is_refused(write, options):
    refused(
        write(**options), f"gives module '{NAME}' rank .*, but its tensors have rank 4: the two files are not of one"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"LORA"', "null", "7", "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\0", "\udcff"]
)
def test_a_config_that_is_no_json_object_is_refused(write, text):
    folder = write()
    (folder / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "is not JSON that can be read|an object of options was expected")


def test_a_file_that_is_missing_is_named(write):
    refused(write() / "gone", f"gone.{CONFIG_FILE}' can't be read")
    folder = write()
    (folder / WEIGHTS_FILE).unlink()
    refused(folder, f"There is no file '.*{WEIGHTS_FILE}'")


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40], lambda b: b"", lambda b: b"PK\3\4" + b[4:]])
def test_a_weights_file_that_is_cut_off_is_refused(write, damage):
    folder = write()
    (folder / WEIGHTS_FILE).write_bytes(damage(save(tensors())))
    refused(folder, f"{WEIGHTS_FILE}' is not a readable safetensors file, or cut off")


def test_half_a_lora_is_refused(write):
    values = {**tensors(), **tensors("other.to_q")}
    del values["base_model.model.other.to_q.lora_B.weight"]
    refused(write(values), "is damaged: 'other.to_q' has only one of lora_A and lora_B")


def test_a_file_without_a_lora_is_refused(write):
    refused(
        write({"some.weight": torch.ones(2)}), "holds no LoRA: no tensor's name ends in .lora_A.weight .'some.weight'"
    )


@pytest.mark.parametrize(
    "second", ["base_model.model.{}.lora_{}.other.weight", "{}.lora_{}.default.weight"], ids=["adapters", "names"]
)
def test_two_loras_in_one_file_are_refused(write, second):
    first = tensors(form="base_model.model.{}.lora_{}.default.weight")
    refused(write({**first, **tensors(form=second)}), "holds more than one LoRA")


@pytest.mark.parametrize(
    ("down", "up"),
    [((4, 8), (6, 3)), ((4,), (6, 4)), ((4,), (4,)), ((4, 8), (6, 4, 1)), ((4, 3, 2, 2), (6, 4, 2, 2)),
     ((0, 8), (6, 0)), ((4, 0), (6, 4)), ((4, 8), (0, 4))],
)  # fmt: skip
def test_tensors_that_do_not_multiply_are_refused_with_their_shapes(write, down, up):
    values = {f"{NAME}.lora_A.weight": torch.ones(down), f"{NAME}.lora_B.weight": torch.ones(up)}
    shapes = f"lora_A {down} and lora_B {up}".replace("(", r"\(").replace(")", r"\)")
    refused(write(values), f"module '{NAME}' has {shapes}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused(write, value):
    values = tensors()
    next(iter(values.values()))[1, 2] = value
    refused(write(values), f"module '{NAME}' holds NaN or infinity")


def test_whole_numbers_as_tensors_are_refused(write):
    refused(
        write({key: value.int() for key, value in tensors().items()}), "is of torch.int32; floating point was expected"
    )
