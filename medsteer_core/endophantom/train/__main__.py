"""Command line of the training steps; run them in the order data, generator, decoder, judges, bundle.

The others look: `grid` and `tiles` draw, `confounding` measures the training data, `recipe` prints the shipped one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..pixart_twin import PixArtConfig


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m medsteer_core.endophantom.train", description=__doc__)
    out.add_argument(
        "step", choices=("data", "generator", "decoder", "judges", "bundle", "grid", "tiles", "confounding", "recipe")
    )
    out.add_argument("--folder", type=Path, default=Path("output/training"), help="where a run keeps its files")
    out.add_argument("--steps", type=int, help="training steps (defaults: generator 15000, decoder 2600, judges 1500)")
    out.add_argument("--count", type=int, default=40_960, help="phantoms to render (data)")
    out.add_argument("--confounding", type=float, default=0.47, help="how far anatomy leans with the class (data)")
    out.add_argument("--channels", type=int, default=16, help="latent channels (data)")
    out.add_argument("--batch", type=int, default=64, help="batch size (generator)")
    out.add_argument("--rate", type=float, default=1e-3, help="peak learning rate (generator)")
    out.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    out.add_argument("--threads", type=int, default=2, help="CPU threads")
    out.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    return out


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    folder = args.folder
    if args.step == "data":
        from . import data

        data.run(folder, args.count, args.channels, args.confounding)
    elif args.step == "generator":
        from . import generator

        config = PixArtConfig(in_channels=args.channels)
        generator.run(folder, args.steps or 15000, args.batch, args.rate, args.seed, args.device, config)
    elif args.step == "decoder":
        from . import decoder

        decoder.run(folder, args.steps or 2600)
    elif args.step == "judges":
        from . import judges

        judges.run(folder, args.steps or 1500)
    elif args.step == "confounding":
        from . import data

        data.print_confounding(args.confounding)
    elif args.step == "grid":
        from . import grid

        grid.run(folder)
    elif args.step == "tiles":
        from . import grid

        grid.tiles(folder, args.seed)
    elif args.step == "recipe":
        from ..bundle import Bundle

        print(json.dumps(Bundle().recipe, indent=1))
    else:
        from . import bundle

        bundle.run(folder)


main()
