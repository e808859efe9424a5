"""Stage 2b: words keep their meaning after a picture. `torchrun --nproc-per-node 2 -m tiny.making.settle_vlm` (minutes)

After stage 2, [V] takes over the concept from a picture, but the ordinary words of the prompt ("on mint") do not
survive beside it: nothing asked for that, and their features fill up with what the picture shows. Here a copy of the
VLM learns to give, at hidden_states[-2]:
- in text contexts, what the VLM of stage 2 gives;
- in image + text contexts the same as that VLM too, except for the prompt's words outside [V], which shall look as they
  do in a text context. Then a transformer that can read them there can read them here.
"""
import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny.contexts import IMAGE_TOKENS, VlmFeatures, load_features
from tiny.making.stage import Stage
from tiny.making.tokenizer import CONCEPT
from tiny.making.train_vlm import draw_concepts, export, is_matrix, unit
from tiny.models import Z_IMAGE_FOLDER
from tiny.world import Renderer, caption, generator, other_view, random_tell

HEAD, TAIL = 3, 5                       # tokens of the chat template before and after the prompt
SHIFT = IMAGE_TOKENS + 2                # how much later the prompt starts behind a picture and its two marks


def real(lengths: Tensor, longest: int) -> Tensor:
    """(B, longest) bool: tokens that are no padding."""
    return torch.arange(longest) < lengths[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/tiny/settle"), help="folder of the state and the log")
    parser.add_argument("--model", type=Path, default=Z_IMAGE_FOLDER,
                        help="checkpoint folder whose text_encoder/ and vlm/ are read and written")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="pictures per process and step")
    parser.add_argument("--seed", type=int, default=0, help="random seed of scenes and pictures")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    before, render = load_features(options.model), Renderer()
    vlm = copy.deepcopy(before.model).requires_grad_(True)
    after = VlmFeatures(vlm, before.tokenizer)
    concept = torch.tensor(before.tokenizer.convert_tokens_to_ids(list(CONCEPT)))
    stage = Stage(vlm, options.out, options.steps, adam=1e-3, muon=0.01, ema=0.99, warmup=30, is_matrix=is_matrix)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = generator(options.seed + 40, step * stage.processes + stage.rank)
        kind = "style" if step % 3 == 2 else "object"
        rows = draw_concepts(options.batch, g, kind)
        prompts = [caption(row, random_tell(g), concept=kind) for row in rows]
        pictures = render.draw(other_view(rows, kind, g), g)
        with torch.no_grad():
            text, ids, lengths = before(prompts)
            target = unit(before(prompts, pictures)[0][-2])
            place = torch.arange(ids.shape[1])
            words = (place >= HEAD) & (place < lengths[:, None] - TAIL) & ~torch.isin(ids, concept)     # (B, L)
            target[:, SHIFT:][words] = unit(text[-2])[words]
            told = [caption(row, random_tell(g)) for row in rows] + prompts
            plain, _, plain_lengths = before(told)
        states, ids, lengths = after(prompts, pictures)
        wrong = (unit(states[-2]) - target).square().mean(-1)                                           # (B, SHIFT + L)
        image = wrong[real(lengths, ids.shape[1])].mean()
        text_kept = F.mse_loss(unit(after(told)[0][-2]), unit(plain[-2]), reduction="none").mean(-1)
        text_kept = text_kept[real(plain_lengths, plain[-2].shape[1])].mean()
        return image + text_kept, {"image": image.item(), "words": wrong[:, SHIFT:][words].mean().item(),
                                   "[V]": wrong[torch.isin(ids, concept)].mean().item(), "text": text_kept.item()}

    for step in stage.run(loss_of, save_every=200):
        print(f"\nstep {step}")
    if stage.rank == 0:
        export(stage.averaged(), None, options.model)


if __name__ == "__main__":
    main()
