"""What AdamW's moments in bfloat16 do to its updates: the same gradients with moments in float32
and with moments rounded after every update.

Gradients are normal noise around a small mean, of one scale per parameter; in the second part all
of them are a tenth as large.

    python benchmarks/optimizer_state.py
"""

from __future__ import annotations

import argparse

import torch


def main() -> None:
    """Print the ratios of second moments and of update sizes at some updates."""
    parser = argparse.ArgumentParser(description="AdamW with moments in bfloat16.")
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--updates", type=int, default=800, help="half of them per part")
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--lr", type=float, default=1e-6)
    arguments = parser.parse_args()
    random = torch.Generator().manual_seed(0)
    scales = torch.randn(arguments.parameters, generator=random).exp()
    runs = {name: [torch.zeros(arguments.parameters)] for name in ("float32", "bfloat16")}
    optimizers = {
        name: torch.optim.AdamW(
            parameters, arguments.lr, betas=(0.9, arguments.beta2), eps=1e-8, weight_decay=0.1
        )
        for name, parameters in runs.items()
    }
    print("update  gradient  second moment, bfloat16 / float32 (quartiles)  size of the update")
    for update in range(1, arguments.updates + 1):
        size = 1.0 if update <= arguments.updates // 2 else 0.1
        noise = torch.randn(arguments.parameters, generator=random)
        moved = {}
        for name, (parameter,) in runs.items():
            before = parameter.clone()
            parameter.grad = size * scales * (noise + 0.1)
            optimizers[name].step()
            moved[name] = float((parameter - before).double().norm())
            if name == "bfloat16":
                state = optimizers[name].state[parameter]
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment].copy_(state[moment].bfloat16())
        if update in (1, 10, 100) or not update % (arguments.updates // 4):
            rounded, exact = (
                optimizers[name].state[parameters[0]]["exp_avg_sq"]
                for name, parameters in reversed(runs.items())
            )
            quartiles = (rounded / exact).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            shown = "  ".join(f"{each:.2f}" for each in quartiles)
            ratio = moved["bfloat16"] / moved["float32"]
            print(f"{update:6d}  {size:8.1f}  {shown:>47}  {ratio:18.2f}")


if __name__ == "__main__":
    main()
