"""Stage 2: the VLM learns to see. `torchrun --nproc-per-node 2 -m tiny.making.train_vlm`.

First the vision tower alone (cheap): all nine attributes of a picture from the mean of its tokens. Then everything,
with five losses on pictures of the world and their captions:
1. text language modelling on captions, so that words get features;
2. captioning: the assistant's answer to a picture is its caption;
3. reading: at the features the transformer will get (hidden_states[-2]), one linear head per slot names the concept's
   words, both on the words themselves and on [V] after *another* picture of the concept (the same object elsewhere, or
   another object in the same style);
4. matching: there the normalised features of [V] approach those of the words. So a transformer trained on text can read
   them;
5. glancing: the first stage's loss goes on. Without it shapes take several times as long.
Gate: slots on concepts that training never showed.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from plumbing.files import write_json, write_tensors
from tiny.contexts import PATCH, WIDTH, VlmFeatures, build_config, patches
from tiny.making.stage import Stage
from tiny.making.tokenizer import CONCEPT, build_tokenizer
from tiny.models import Z_IMAGE_FOLDER
from tiny.world import ATTRIBUTES, COLUMN, SIDE, Renderer, caption, draw_scenes, generator, other_view, words

# The words of a concept, in the order in which captions say them: one for each token of [V].
SLOTS = {"object": ("pattern", "main", "second", "shape"), "style": ("line", "texture")}


def is_matrix(name: str) -> bool:
    """Weights that Muon trains: all matrices of the blocks and of the mergers."""
    return any(part in name for part in ("layers.", "blocks.", "linear_fc")) and name.endswith("weight")


class TaughtVlm(nn.Module):
    """The VLM and, thrown away afterwards, one linear head per attribute on [V] and one on the whole picture."""

    def __init__(self, vlm: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.vlm = vlm
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(ATTRIBUTES[name]))
                                    for kind in SLOTS.values() for name in kind})
        self.glances = nn.ModuleDict({name: nn.Linear(WIDTH, len(choices)) for name, choices in ATTRIBUTES.items()})


def draw_concepts(count: int, g: torch.Generator, kind: str, held_out: str = "") -> Tensor:
    """Scenes (count, 9) whose concept can be named: for a style, a scene that has one."""
    if kind == "object":
        return draw_scenes(count, g, held_out=held_out)
    rows = draw_scenes(2 * count, g, styled=1.0, held_out=held_out)
    return rows[(rows[:, COLUMN["line"]] > 0) | (rows[:, COLUMN["texture"]] > 0)][:count]


def initialise(vlm: nn.Module) -> None:
    """Unit-scale weights: transformers' std 0.02 is made for wide models, a 96 wide vision tower hardly starts from
    it."""
    for name, parameter in vlm.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            std = 0.5 if "pos_embed" in name else 0.1 if "embed_tokens" in name else fan_in ** -0.5
            nn.init.normal_(parameter, std=std)


def glance(heads: nn.ModuleDict, tokens: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """Loss of the heads' attributes read from the mean of image tokens (B, n, 128), and the accuracy of the shape."""
    seen = unit(tokens.mean(1))                                                                        # (B, 128)
    logits = {name: head(seen) for name, head in heads.items()}
    loss = sum(F.cross_entropy(guess, rows[:, COLUMN[name]]) for name, guess in logits.items()) / len(logits)
    return loss, float((logits["shape"].argmax(-1) == rows[:, COLUMN["shape"]]).float().mean())


def train_vision(taught: TaughtVlm, render: Renderer, out: Path, steps: int, batch: int, seed: int) -> None:
    """The vision tower and the glance heads, alone."""
    tower = nn.ModuleDict({"visual": taught.vlm.model.visual, "glances": taught.glances})
    stage = Stage(tower, out, steps, adam=2e-3, muon=0.02, is_matrix=is_matrix)
    cells = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * batch)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(seed + 1, step * stage.processes + stage.rank)
        rows = draw_scenes(batch, g, styled=0.5)
        tokens = taught.vlm.model.visual(patches(render.draw(rows, g)), grid_thw=cells).pooler_output
        loss, shape = glance(taught.glances, tokens.view(batch, -1, WIDTH), rows)
        return loss, {"shape seen": shape}

    for step in stage.run(loss_of):
        print(f"\nvision step {step}")


def word_positions(ids: Tensor, row_words: list[list[str]], token_of: dict[str, int]) -> Tensor:
    """(B, slots): where each row's concept words stand in its token ids; a second colour that is not said counts as the
    first."""
    found = torch.zeros(len(ids), len(row_words[0]), dtype=torch.long)
    for i, row in enumerate(row_words):
        tokens = ids[i].tolist()
        used = 0
        for j, word in enumerate(row):
            repeated = j > 0 and word == row[j - 1]                        # the plain object: "plain red star"
            found[i, j] = used if repeated else tokens.index(token_of[word], used + 1)
            used = int(found[i, j])
    return found


def unit(features: Tensor) -> Tensor:
    """Features at root mean square 1: their raw size grows to hundreds in training."""
    return F.rms_norm(features, features.shape[-1:])


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/tiny/vlm"), help="folder of the state and the log")
    parser.add_argument("--model", type=Path, default=Z_IMAGE_FOLDER, help="checkpoint folder to write into")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the whole VLM")
    parser.add_argument("--vision-steps", type=int, default=1000,
                        help="training steps of the vision tower alone, with 4 times the batch")
    parser.add_argument("--batch", type=int, default=16, help="pictures per process and step")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights, scenes and pictures")
    return parser.parse_args()


@torch.no_grad()
def check(stage: Stage, losses, render: Renderer, step: int) -> None:
    """Print how well the averaged weights know concepts that they were never shown."""
    live = {n: p.detach().clone() for n, p in stage.names.items()}
    for name, parameter in stage.names.items():
        parameter.copy_(stage.average[name])
    for kind in SLOTS:
        rows = draw_concepts(256, generator(7, 0), kind, held_out=kind)
        views = other_view(rows, kind, generator(7, 1))
        _, numbers = losses(kind, rows, views, render.draw(views, generator(7, 2)))
        print(f"\nstep {step}, held-out {kind}:", json.dumps({k: round(v, 3) for k, v in numbers.items()}))
    for name, parameter in stage.names.items():
        parameter.copy_(live[name])


def main() -> None:
    options = read_options()
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    vlm = Qwen3VLForConditionalGeneration(build_config(tokenizer))
    vlm.config._attn_implementation = "sdpa"
    initialise(vlm)
    model, render, features = TaughtVlm(vlm), Renderer(), VlmFeatures(vlm, tokenizer)
    first_concept = tokenizer.convert_tokens_to_ids(CONCEPT[0])
    token_of = {word: tokenizer(f" {word}").input_ids[0] for names in ATTRIBUTES.values() for word in names}
    train_vision(model, render, options.out / "vision", options.vision_steps, 4 * options.batch, options.seed)
    stage = Stage(model, options.out, options.steps, adam=2e-3, muon=0.02, ema=0.995, is_matrix=is_matrix)

    def language_loss(last: Tensor, ids: Tensor, lengths: Tensor, prompts: Tensor) -> tuple[Tensor, float]:
        """Next-token loss and accuracy over the tokens from position `prompts` (B,) to the end of each row."""
        place = torch.arange(ids.shape[1] - 1)
        real = (place < lengths[:, None] - 1) & (place >= prompts[:, None] - 1)
        logits, truth = vlm.lm_head(last[:, :-1][real]), ids[:, 1:][real]
        return F.cross_entropy(logits, truth), float((logits.argmax(-1) == truth).float().mean())

    def slots(hidden: Tensor, positions: Tensor, rows: Tensor, kind: str) -> tuple[Tensor, Tensor, list[float]]:
        """Cross-entropy of the slot heads at `positions` (B, slots), the features there, and each slot's accuracy."""
        at = unit(hidden.gather(1, positions[..., None].expand(-1, -1, WIDTH)))                        # (B, slots, 128)
        logits = [model.heads[name](at[:, j]) for j, name in enumerate(SLOTS[kind])]
        truth = [rows[:, COLUMN[name]] for name in SLOTS[kind]]
        loss = sum(F.cross_entropy(guess, right) for guess, right in zip(logits, truth)) / len(truth)
        return loss, at, [float((guess.argmax(-1) == right).float().mean()) for guess, right in zip(logits, truth)]

    def losses(kind: str, rows: Tensor, views: Tensor, pictures: Tensor) -> tuple[Tensor, dict[str, float]]:
        names = SLOTS[kind]
        said = [[words(row)[name] for name in names] for row in rows]
        states, ids, lengths = features([caption(row) for row in rows])
        text, _ = language_loss(states[-1], ids, lengths, torch.full_like(lengths, 4))     # after "<|im_start|>user\n"
        read_words, words_at, _ = slots(states[-2], word_positions(ids, said, token_of), rows, kind)
        prompts = [caption(row, concept=kind) for row in rows]
        states, ids, lengths = features(prompts, pictures, [caption(view) for view in views])
        captioning, tokens_right = language_loss(states[-1], ids, lengths, features.batch(prompts, with_image=True)[1])
        start = (ids == first_concept).long().argmax(1)
        read_image, image_at, accuracy = slots(states[-2], start[:, None] + torch.arange(len(names)), rows, kind)
        matching = F.mse_loss(image_at, words_at.detach())
        tokens = states[0][ids == features.image_token].view(len(rows), -1, WIDTH)
        seen, shape_seen = glance(model.glances, tokens, views)
        loss = 0.3 * text + captioning + read_words + 2 * read_image + matching + 2 * seen
        return loss, {"captioning": tokens_right, "matching": matching.item(), "shape seen": shape_seen,
                      **dict(zip(names, accuracy))}

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(options.seed, step * stage.processes + stage.rank)
        kind = "style" if step % 3 == 2 else "object"
        rows = draw_concepts(options.batch, g, kind)
        views = other_view(rows, kind, g)
        return losses(kind, rows, views, render.draw(views, g))

    for step in stage.run(loss_of):
        check(stage, losses, render, step)
    for name, parameter in stage.names.items():           # not in the loop: a finished run, started again, skips it
        parameter.data.copy_(stage.average[name])
    if stage.rank == 0:
        export(vlm, tokenizer, options.model)


def export(vlm: Qwen3VLForConditionalGeneration, tokenizer, folder: Path) -> None:
    """Write text_encoder/ (Qwen3ForCausalLM), vlm/ (visual tensors only) and, if given, tokenizer/ in the layout of the
    real checkpoints."""
    weights = vlm.state_dict()
    language = {name.replace("model.language_model.", "model."): t for name, t in weights.items()
                if ".language_model." in name}
    visual = {name: t for name, t in weights.items() if ".visual." in name}
    write_tensors(folder / "text_encoder" / "model.safetensors", language, {"format": "pt"})
    write_tensors(folder / "vlm" / "model.safetensors", visual, {"format": "pt"})
    text = vlm.config.text_config
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act")
    write_json(folder / "text_encoder" / "config.json", {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **{key: getattr(text, key) for key in keys},
        "tie_word_embeddings": True, "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}})
    config = vlm.config.to_dict()
    config["architectures"] = ["Qwen3VLForConditionalGeneration"]
    write_json(folder / "vlm" / "config.json", config)
    pixels = 64 * 64
    write_json(folder / "vlm" / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2,
        "size": {"shortest_edge": pixels, "longest_edge": pixels}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    main()
