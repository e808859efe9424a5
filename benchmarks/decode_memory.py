"""Peak memory of decoding one 1024x1024 image: `python -m benchmarks.decode_memory` (CPU, random weights, a minute).

The autoencoder has Z-Image-Turbo's sizes. The figure is the growth of the process's peak over what it held before.
"""
import resource
import sys
import time

import torch

from networks.vae import Autoencoder

CONFIG = {"in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": [128, 256, 512, 512],
          "layers_per_block": 2, "norm_num_groups": 32, "use_quant_conv": False, "use_post_quant_conv": False,
          "scaling_factor": 0.3611, "shift_factor": 0.1159}


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def main() -> None:
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    torch.manual_seed(0)
    vae = Autoencoder(CONFIG).eval()
    before, started = peak_gb(), time.time()
    picture = vae.decode(torch.randn(1, 16, side // 8, side // 8))
    print(f"decode to {tuple(picture.shape)}: {peak_gb() - before:.2f} GB above the {before:.2f} GB with weights, "
          f"{time.time() - started:.1f} s, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
