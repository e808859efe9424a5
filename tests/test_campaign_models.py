"""The campaign against checkpoints, their weights and tokenizers, and LoRA files. A row is an attack."""
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from campaign import (ENCODER, LONG, SAMPLE, TRAIN, TRANSFORMER, VAE, WEIGHTS, End, Place, cut, edit_json, edit_tensors,
                      either, folder_instead, refused, stopped, works)
from safetensors.torch import load_file, save_file

LAYER = "transformer.layers.0.attention.to_q"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"      # (3, 32) and (32, 3)
FACTS = "lora_adapter_metadata"                                 # where diffusers keeps alpha
EVIL = "([a-z_.0-9]+)+!"                                        # a pattern that takes until the end of time
NAN = torch.tensor(float("nan"))


# ---------------------------------------------------------------------------------------------------- damages
def all_as(path: Path, dtype: torch.dtype) -> None:
    edit_tensors(path, lambda w: w.update({name: tensor.to(dtype) for name, tensor in w.items()}))


def spoil(path: Path, part: str, value: float = float("nan")) -> None:
    """One number of every tensor whose name has `part` becomes `value`."""
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if part in name:
                weights[name].view(-1)[0] = value
    edit_tensors(path, change)


def header(path: Path, text: str, length: int | None = None) -> None:
    """A safetensors file with this header and nothing behind it."""
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text.encode())


def index(path: Path, weight_map: object) -> None:
    """An index beside the weights at `path`."""
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def listed(path: Path, **files: object) -> None:
    """An index of all tensors, of which some are elsewhere."""
    index(path, {name: path.name for name in load_file(path)} | files)


def mean(place: Place, **values: list) -> None:
    edit_json(place.model / "vlm" / "preprocessor_config.json", **values)


def tokens(place: Place, **changes: object) -> None:
    """Ids of words in the tokenizer."""
    path = place.model / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= changes
    path.write_text(json.dumps(content))


def code(place: Place) -> None:
    """A tokenizer that asks to be built by Python code beside it."""
    edit_json(place.model / "tokenizer" / "tokenizer_config.json", tokenizer_class="Mine",
              auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (place.model / "tokenizer" / "mine.py").write_text(f"open({str(place.root / 'code ran')!r}, 'w')\nclass Mine: ...")


def facts(path: Path, **fields: object) -> None:
    """alpha as diffusers writes it, in the metadata."""
    edit_tensors(path, lambda w: None, **{FACTS: json.dumps({f"transformer.{k}": v for k, v in fields.items()})})


def peft(path: Path, config: str | None) -> None:
    """The adapter in PEFT's spelling, and adapter_config.json."""
    weights = load_file(path)
    save_file({key.replace("transformer.", "base_model.model."): tensor for key, tensor in weights.items()}, path)
    if config is not None:
        path.with_name("adapter_config.json").write_text(config)


def config(name: str) -> str:
    return f"ROOT/model/{name}/config.json"


# ---------------------------------------------------------------------------------------------------- tables
CHECKPOINT = {  # attack: damage, the end; of both programs
    "weights, zero bytes": (lambda m: (m / TRANSFORMER).write_bytes(b""), refused(WEIGHTS, "not a complete")),
    "weights, a text": (lambda m: (m / TRANSFORMER).write_text("hello, this is text"), refused(WEIGHTS)),
    "weights, a folder": (lambda m: folder_instead(m / TRANSFORMER), refused("transformer")),
    "weights, a link to nowhere": (lambda m: ((m / TRANSFORMER).unlink(), (m / TRANSFORMER).symlink_to("nowhere")),
                                   refused(WEIGHTS)),
    "weights, a link to itself": (lambda m: ((m / TRANSFORMER).unlink(), (m / TRANSFORMER).symlink_to(WEIGHTS)),
                                  refused(WEIGHTS)),
    "weights, a header of 2 ** 63 bytes": (lambda m: header(m / TRANSFORMER, "{}", 2 ** 63), refused(WEIGHTS)),
    "weights, a header that is a list": (lambda m: header(m / TRANSFORMER, "[]"), refused(WEIGHTS)),
    "weights, a deep header": (lambda m: header(m / TRANSFORMER, '{"a":' * 10 ** 5), refused(WEIGHTS)),
    "weights, tensors beyond the end": (lambda m: header(
        m / TRANSFORMER, '{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), refused(WEIGHTS)),
    "weights, a dtype of tomorrow": (lambda m: header(
        m / TRANSFORMER, '{"a":{"dtype":"F1","shape":[],"data_offsets":[0,0]}}'), refused(WEIGHTS)),
    "weights, no tensors": (lambda m: edit_tensors(m / TRANSFORMER, dict.clear), refused("transformer", "download")),
    "weights, one missing": (lambda m: edit_tensors(m / TRANSFORMER, lambda w: w.pop("x_pad_token")),
                             refused("x_pad_token", "missing")),
    "weights, one more": (lambda m: edit_tensors(m / TRANSFORMER, lambda w: w.update(foreign=NAN)),
                          refused("unknown tensor foreign")),
    "weights, one turned": (lambda m: edit_tensors(m / TRANSFORMER, lambda w: w.update(
        x_pad_token=w["x_pad_token"].t().contiguous())), refused("x_pad_token", "shape")),
    "weights, twice": (lambda m: shutil.copy(m / TRANSFORMER, m / "transformer" / "b.safetensors"),
                       refused("transformer")),
    "weights, whole numbers": (lambda m: all_as(m / TRANSFORMER, torch.int32), refused("transformer", "floats")),
    "weights, bytes": (lambda m: all_as(m / TRANSFORMER, torch.int8), refused("transformer", "floats")),
    "weights, true or false": (lambda m: all_as(m / VAE, torch.bool), refused("vae", "floats")),
    "weights, complex": (lambda m: all_as(m / ENCODER, torch.complex64), refused("text_encoder", "floats")),
    "weights, float16": (lambda m: all_as(m / TRANSFORMER, torch.float16), works()),
    "weights, float64": (lambda m: all_as(m / TRANSFORMER, torch.float64), works()),
    "weights, float8": (lambda m: all_as(m / TRANSFORMER, torch.float8_e4m3fn), either("transformer")),
    "weights, of another network": (lambda m: shutil.copy(m / ENCODER, m / VAE), refused("vae", "unknown tensor")),
    "index, no map": (lambda m: (m / f"{TRANSFORMER}.index.json").write_text("{}"), refused("weight_map")),
    "index, a list": (lambda m: index(m / TRANSFORMER, []), refused("weight_map")),
    "index, empty": (lambda m: index(m / TRANSFORMER, {}), refused("transformer", "missing")),
    "index, not JSON": (lambda m: (m / f"{TRANSFORMER}.index.json").write_text("oops"), refused("index.json")),
    "index, a folder": (lambda m: (m / f"{TRANSFORMER}.index.json").mkdir(), refused("index.json")),
    "index, a tensor that is not there": (lambda m: listed(m / TRANSFORMER, nothing=WEIGHTS), refused("nothing")),
    "index, a file of 300 characters": (lambda m: listed(m / TRANSFORMER, x_pad_token=LONG), refused("index.json")),
    "config, zero bytes": (lambda m: (m / "transformer/config.json").write_text(""), refused(config("transformer"))),
    "config, a list": (lambda m: (m / "transformer/config.json").write_text("[]"), refused(config("transformer"))),
    "config, a folder": (lambda m: folder_instead(m / "transformer/config.json"), refused(config("transformer"))),
    "config, 5000 digits": (lambda m: (m / "transformer/config.json").write_text('{"dim": ' + "1" * 5000 + "}"),
                            refused(config("transformer"))),
    "config, a byte order mark": (lambda m: (m / "transformer/config.json").write_text(
        "\ufeff" + (m / "transformer/config.json").read_text()), either(config("transformer"))),
    "config, another class": (lambda m: edit_json(m / "transformer/config.json", _class_name="SD3Transformer2DModel"),
                              refused("SD3Transformer2DModel", "not supported")),
    "config, a list of classes": (lambda m: edit_json(m / "transformer/config.json", _class_name=["a"]),
                                  refused("_class_name")),
    "config, another VAE": (lambda m: edit_json(m / "vae/config.json", _class_name="AutoencoderDC"), refused("vae")),
    "config, fewer channels": (lambda m: edit_json(m / "vae/config.json", latent_channels=4), refused()),
    "config, a deeper VAE": (lambda m: edit_json(m / "vae/config.json", block_out_channels=[8, 8, 8, 8, 8]),
                             refused("vae")),
    "config, one layer of text": (lambda m: edit_json(m / "text_encoder/config.json", num_hidden_layers=1),
                                  refused("text encoder", "num_hidden_layers")),
    "config, more words": (lambda m: edit_json(m / "text_encoder/config.json", vocab_size=1000),
                           refused("ROOT/model")),
    "pipeline, a folder": (lambda m: folder_instead(m / "model_index.json"), refused("model_index.json")),
    "pipeline, bytes": (lambda m: (m / "model_index.json").write_bytes(b"\xff\0"), either("model_index.json")),
    "tokenizer, zero bytes": (lambda m: (m / "tokenizer/tokenizer.json").write_text(""), refused("tokenizer")),
    "tokenizer, empty": (lambda m: (m / "tokenizer/tokenizer.json").write_text("{}"), refused("tokenizer")),
    "tokenizer, a folder": (lambda m: folder_instead(m / "tokenizer/tokenizer.json"), refused("tokenizer")),
    "tokenizer, config cut": (lambda m: cut(m / "tokenizer/tokenizer_config.json"), refused("tokenizer")),
    "tokenizer, no padding": (lambda m: edit_json(m / "tokenizer/tokenizer_config.json", pad_token=None),
                              refused("tokenizer", "pad_token")),
    "tokenizer, brings code": (lambda m: code(Place(m.parent)), either("tokenizer")),
    "tokenizer, ids beyond the embedding": (lambda m: tokens(Place(m.parent), Ġred=5000), refused("tokenizer")),
    "tokenizer, broken template": (lambda m: (m / "tokenizer/chat_template.jinja").write_text("{% if"), works()),
    "tokenizer, a word for a length": (lambda m: edit_json(m / "tokenizer/tokenizer_config.json", model_max_length="x"),
                                       either("tokenizer")),
}
VLM = {  # attack: damage, the end; where the teacher's context is needed
    "weights, of the text encoder": (lambda v: shutil.copy(v.parent / ENCODER, v), refused("vlm", "no vision tensors")),
    "weights, a folder": (lambda v: folder_instead(v / "model.safetensors"), refused("vlm")),
    "weights, one missing": (lambda v: edit_tensors(v / "model.safetensors", dict.popitem), refused("missing")),
    "weights, whole numbers": (lambda v: all_as(v / "model.safetensors", torch.int32), refused("vlm", "floats")),
    "weights, not finite": (lambda v: spoil(v / "model.safetensors", "visual"), stopped("not finite")),
    "index, numbers": (lambda v: index(v / "model.safetensors", {"visual.a": 3, "visual.b": "x"}), refused("index")),
    "index, lists": (lambda v: index(v / "model.safetensors", {"visual.a": []}), refused("index")),
    "config, another width": (lambda v: edit_json(v / "config.json", text_config={"hidden_size": 64}), refused("vlm")),
    "config, another mark": (lambda v: edit_json(v / "config.json", image_token_id=1), refused("<|image_pad|>")),
    "preprocessor, zero bytes": (lambda v: (v / "preprocessor_config.json").write_text(""), refused("preprocessor")),
    "preprocessor, other patches": (lambda v: edit_json(v / "preprocessor_config.json", patch_size=2),
                                    refused("patch_size")),
    "preprocessor, two colours": (lambda v: mean(Place(v.parent.parent), image_mean=[0.5, 0.5]), refused("mean")),
    "preprocessor, no spread": (lambda v: mean(Place(v.parent.parent), image_std=[0, 0, 0]), stopped("not finite")),
}
NOT_FINITE = {  # attack: damage, the end of train.py, of sample.py
    "transformer": (lambda m: spoil(m / TRANSFORMER, "layers.0.attention.to_q"), stopped("step 1", "ROOT/model"),
                    refused("not finite")),
    "transformer, infinite": (lambda m: spoil(m / TRANSFORMER, "x_embedder", float("inf")), stopped("step 1"),
                              refused("not finite")),
    "VAE, on the way in": (lambda m: spoil(m / VAE, "encoder.conv_in"), stopped("latents", "not finite"), works()),
    "VAE, on the way out": (lambda m: spoil(m / VAE, "decoder.conv_in"), works(), refused("not finite")),
    "text encoder": (lambda m: spoil(m / ENCODER, "layers.0"), stopped("not finite"), refused("not finite")),
}
LORA = {  # attack: damage, the end of sample.py --lora ROOT/adapter.safetensors
    "zero bytes": (lambda f: f.write_bytes(b""), refused("adapter", "not a complete")),
    "no tensors": (lambda f: edit_tensors(f, dict.clear), refused("adapter", "no LoRA")),
    "a text": (lambda f: f.write_text("hello, this is a text"), refused("adapter", "not a complete")),
    "a pickle": (lambda f: torch.save({"a": NAN}, f), refused("adapter", "not a complete")),
    "a folder": (lambda f: folder_instead(f), refused("adapter", "no such file")),
    "a link to itself": (lambda f: (f.unlink(), f.symlink_to(f)), refused("adapter", "no such file")),
    "not finite": (lambda f: spoil(f, A), refused("adapter", A, "not finite")),
    "infinite": (lambda f: spoil(f, B, float("-inf")), refused("adapter", B, "not finite")),
    "beyond float32": (lambda f: edit_tensors(f, lambda w: w.update({A: w[A].double() * 1e300})), refused("finite")),
    "too large to multiply": (lambda f: edit_tensors(f, lambda w: w.update({A: w[A] * 1e37, B: w[B] * 1e37})),
                              refused("not finite")),
    "whole numbers": (lambda f: all_as(f, torch.int32), refused("adapter", "int32")),
    "complex": (lambda f: all_as(f, torch.complex64), refused("adapter", "complex64")),
    "float8": (lambda f: all_as(f, torch.float8_e4m3fn), either("adapter")),
    "bfloat16": (lambda f: all_as(f, torch.bfloat16), works()),
    "zeros": (lambda f: edit_tensors(f, lambda w: [t.zero_() for t in w.values()]), works()),
    "half a pair": (lambda f: edit_tensors(f, lambda w: w.pop(B)), refused("adapter", "no matrix B")),
    "another rank in B": (lambda f: edit_tensors(f, lambda w: w.update({B: torch.ones(32, 4)})),
                          refused("adapter", "shapes")),
    "rank 0": (lambda f: edit_tensors(f, lambda w: w.update({A: torch.ones(0, 32), B: torch.ones(32, 0)})),
               refused("adapter", "shapes")),
    "a convolution": (lambda f: edit_tensors(f, lambda w: w.update({A: w[A][..., None, None].contiguous()})),
                      refused("adapter", "shapes")),
    "a number": (lambda f: edit_tensors(f, lambda w: w.update({A: torch.ones(())})), refused("adapter", "shapes")),
    "a key of another kind": (lambda f: edit_tensors(f, lambda w: w.update({f"{LAYER}.dora_scale": NAN})),
                              refused("adapter", "dora_scale")),
    "a key of two lines": (lambda f: edit_tensors(f, lambda w: w.update({"a\nb": NAN})), refused("adapter", "unknown")),
    "a key of a megabyte": (lambda f: edit_tensors(f, lambda w: w.update({"a" * 10 ** 6: NAN})), refused("adapter")),
    "an alpha of three": (lambda f: edit_tensors(f, lambda w: w.update({f"{LAYER}.alpha": torch.ones(3)})),
                          refused("adapter", "alpha")),
    "an empty alpha": (lambda f: edit_tensors(f, lambda w: w.update({f"{LAYER}.alpha": torch.ones(0)})),
                       refused("adapter", "alpha")),
    "a negative alpha": (lambda f: edit_tensors(f, lambda w: w.update({f"{LAYER}.alpha": torch.tensor(-4.0)})),
                         refused("adapter", "alpha")),
    "an alpha that is no number": (lambda f: edit_tensors(f, lambda w: w.update({f"{LAYER}.alpha": NAN})),
                                   refused("adapter", "alpha")),
    "an alpha beyond all pictures": (lambda f: edit_tensors(f, lambda w: w.update(
        {f"{LAYER}.alpha": torch.tensor(3e38), B: w[B] * 1e3})), refused("finite")),
    "one layer in two spellings": (lambda f: edit_tensors(f, lambda w: w.update(
        {key.removeprefix("transformer."): w[key] * 2 for key in (A, B)})), refused("adapter", "twice")),
    "one matrix in two spellings": (lambda f: edit_tensors(f, lambda w: w.update(
        {f"{LAYER}.lora_down.weight": w[A] * 2})), refused("adapter", "twice")),
    "one layer beside the fused one": (lambda f: edit_tensors(f, lambda w: w.update(
        {A.replace("to_q", "qkv"): w[A].clone(), B.replace("to_q", "qkv"): torch.ones(96, 3)})),
        refused("adapter", "twice")),
    "facts, not JSON": (lambda f: edit_tensors(f, lambda w: None, **{FACTS: "oops"}), refused("adapter", FACTS)),
    "facts, deep": (lambda f: edit_tensors(f, lambda w: None, **{FACTS: '{"a":' * 10 ** 5}), refused("adapter", FACTS)),
    "facts, a word": (lambda f: facts(f, lora_alpha="x"), refused("adapter", "lora_alpha")),
    "facts, null": (lambda f: facts(f, lora_alpha=None), refused("adapter", "lora_alpha")),
    "facts, not a number": (lambda f: facts(f, lora_alpha=float("nan")), refused("adapter", "lora_alpha")),
    "facts, negative": (lambda f: facts(f, lora_alpha=-4), refused("adapter", "lora_alpha")),
    "facts, a list of patterns": (lambda f: facts(f, alpha_pattern=["to_q"]), refused("adapter", "alpha_pattern")),
    "facts, a broken pattern": (lambda f: facts(f, alpha_pattern={"(": 3}), refused("adapter", "alpha_pattern")),
    "facts, a word for a pattern": (lambda f: facts(f, alpha_pattern={"to_q": "x"}), refused("adapter", "alpha")),
    "facts, an endless pattern": (lambda f: facts(f, alpha_pattern={EVIL: 3}), either("adapter", "alpha_pattern")),
    "facts, --quantize of tomorrow": (lambda f: edit_tensors(f, lambda w: None, quantize="int1"), works()),
    "PEFT, no config": (lambda f: peft(f, None), works()),
    "PEFT, zero bytes": (lambda f: peft(f, ""), refused("adapter_config.json")),
    "PEFT, a list": (lambda f: peft(f, "[8]"), refused("adapter_config.json")),
    "PEFT, no alpha": (lambda f: peft(f, "{}"), refused("adapter_config.json", "lora_alpha")),
    "PEFT, null": (lambda f: peft(f, '{"lora_alpha": null}'), refused("adapter_config.json", "lora_alpha")),
    "PEFT, a word": (lambda f: peft(f, '{"lora_alpha": "16"}'), refused("adapter_config.json", "lora_alpha")),
    "PEFT, a list for alpha": (lambda f: peft(f, '{"lora_alpha": [16]}'), refused("adapter_config.json", "lora_alpha")),
    "PEFT, infinite": (lambda f: peft(f, '{"lora_alpha": 1e999}'), refused("adapter_config.json", "lora_alpha")),
    "PEFT, 400 digits": (lambda f: peft(f, '{"lora_alpha": 1' + "0" * 400 + "}"), refused("adapter_config.json")),
}


# ---------------------------------------------------------------------------------------------------- the attacks
@pytest.mark.parametrize("attack", CHECKPOINT)
def test_checkpoints(campaign, attack):
    damage, end = CHECKPOINT[attack]
    damage(campaign.place.own_model())
    for program in (TRAIN, SAMPLE):
        campaign(program, None, "", end)
    assert not (campaign.place.root / "code ran").exists()


@pytest.mark.parametrize("attack", VLM)
def test_vlms(campaign, attack):
    damage, end = VLM[attack]
    damage(campaign.place.own_model() / "vlm")
    for program, flags in ((TRAIN, ""), (SAMPLE, "--reference ROOT/data/0.png")):
        campaign(program, None, flags, end)


@pytest.mark.parametrize("attack", NOT_FINITE)
def test_weights_that_are_not_finite(campaign, attack):
    damage, *ends = NOT_FINITE[attack]
    damage(campaign.place.own_model())
    for program, end in zip((SAMPLE, TRAIN), reversed(ends)):
        campaign(program, None, "", end)


@pytest.mark.parametrize("attack", LORA)
def test_loras(campaign, attack):
    damage, end = LORA[attack]
    campaign(SAMPLE, lambda place: damage(place.root / "adapter.safetensors"), "--lora ROOT/adapter.safetensors", end)


@pytest.mark.parametrize("attack", ["not finite", "an alpha of three", "one matrix in two spellings", "PEFT, null"])
def test_loras_as_teachers(campaign, attack):
    """The same reader, before anything is encoded."""
    damage, end = LORA[attack]
    campaign(TRAIN, lambda place: damage(place.root / "adapter.safetensors"),
             "--teacher-lora ROOT/adapter.safetensors", End(end.words, may_refuse=True))
