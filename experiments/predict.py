"""The predictor of a hosted demo, in Cog's signature; without Cog it is a command.

    python -m experiments.predict --prompt "a red star above a blue circle" --n 2 --dtype bfloat16
"""
import inspect
import tempfile

import torch

import sample
from plumbing import cli, training

try:
    from cog import Path
except ImportError:
    from pathlib import Path


class Predictor:
    def setup(self, weights: str = "pocket", dtype: str = "float32"):
        if dtype not in ("float32", "bfloat16", "float16"):
            raise cli.UsageError(f"--dtype {dtype}: expected float32, bfloat16 or float16")
        self.device, self.dtype = training.setup(0).type, getattr(torch, dtype)
        self.chain = sample.load_chain(**sample.find(weights or "pocket"), device=self.device)
        for net in (self.chain.b, self.chain.c):             # those that divide stay float32
            if getattr(net.config, "prediction", "released") == "released":
                exact = torch.autocast(self.device, enabled=False)
                net.forward, net.precompute = exact(net.forward), exact(net.precompute)

    def predict(self, prompt: str, negative: str = "", seed: int = 0, width: int = 0,
                height: int = 0, steps_c: int = 60, guidance_c: float = 4.0, steps_b: int = 12,
                guidance_b: float = None, n: int = 1) -> list[Path]:
        if bool(width) != bool(height):
            raise cli.UsageError(f"--width {width} --height {height}: expected both or neither")
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            images = self.chain.draw([prompt] * n, range(seed, seed + n), (width, height) if width
                                     else None, steps_c, guidance_c, negative, steps_b, guidance_b)
        paths = [Path(tempfile.mkdtemp()) / f"{seed + i}.png" for i in range(n)]
        return [image.save(path) or path for image, path in zip(images, paths)]


def main(argv=None):
    parser, demo = cli.Parser(__doc__), Predictor()
    for step in (demo.setup, demo.predict):
        for one in inspect.signature(step).parameters.values():
            parser.add_argument(f"--{one.name}", type=one.annotation, default=one.default,
                                required=one.default is one.empty)
    given = vars(parser.parse_args(argv))
    demo.setup(given.pop("weights"), given.pop("dtype"))
    print(*demo.predict(**given), sep="\n")


if __name__ == "__main__":
    cli.start(main)
