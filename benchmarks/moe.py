"""The cost of dropless routing: a mixture of experts against a dense MLP with the same arithmetic, forward and backward.

python benchmarks/moe.py [--threads 2] [--tokens 4096] [--width 512] [--inner 1024] [--precision fp32]

Top 2 of 8 experts of inner width F compute as much as one dense SwiGLU of inner width 2 F. The variants alternate, so that a slow moment of
the machine affects all of them. Prints medians of wall time, and on a CPU of the process's CPU time, which excludes other processes. The
last line is the result: a mixture with its own routing should cost at most 1.3. Before timing, at each imbalance, every token's output is
compared with the outputs of its experts one by one, to show that none is dropped.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from manta.trainer.config.model import ExpertsConfig
from manta.trainer.model.layers import SwiGLU
from manta.trainer.model.moe import MixtureOfExperts

EXPERTS, TOP_K, SEQUENCE = 8, 2, 512
GOAL = 1.3
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Choice = tuple[Tensor, Tensor]  # weights_NK, chosen_NK


def main() -> int:
    parser = argparse.ArgumentParser()
    for name, default in {"threads": torch.get_num_threads(), "tokens": 4096, "width": 512, "inner": 1024, "repeats": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"device": device, "dtype": PRECISIONS[options.precision]}
    moe = MixtureOfExperts(options.width, ExpertsConfig(experts=EXPERTS, top_k=TOP_K, width=options.inner)).to(**kind)
    dense = SwiGLU(options.width, TOP_K * options.inner).to(**kind)
    x_BTD = torch.randn(options.tokens // SEQUENCE, SEQUENCE, options.width, **kind)
    steps: dict[str, Callable[[], None]] = {"dense": lambda: step(dense, x_BTD), "own routing": lambda: step(moe, x_BTD)}
    choices = {name: choose(popularity, x_BTD) for name, popularity in imbalances().items()}
    for name, choice in choices.items():
        wrong = dropped(moe, x_BTD, choice)
        print(f"{name}: {wrong} of {options.tokens} tokens dropped")
        if wrong:
            return 1
        steps[name] = lambda choice=choice: step(moe, x_BTD, choice)
    spent = measure(steps, options.repeats)
    print(f"{device}, {torch.get_num_threads()} threads, {options.precision}, {options.tokens} tokens of width {options.width}:")
    ratios: dict[str, dict[str, float]] = {}
    for name, times in spent.items():
        columns = []
        for clock, ours in times.items():
            pairs = zip(ours, spent["dense"][clock], strict=True)
            ratio = statistics.median(own / plain for own, plain in pairs)
            ratios.setdefault(name, {})[clock] = ratio
            columns.append(f"{clock} {statistics.median(ours) * 1e3:8.1f} ms  {ratio:.3f} of dense")
        print(f"  {name:17} {'    '.join(columns)}")
    clock, ratio = next(reversed(ratios["own routing"].items()))
    verdict = "within" if ratio <= GOAL else "over"
    print(f"a mixture costs {ratio:.3f} of a dense MLP with the same arithmetic, by {clock} time: {verdict} the goal of {GOAL}")
    return 0 if ratio <= GOAL else 1


def imbalances() -> dict[str, Tensor]:
    """Return the popularity of each expert."""
    one = torch.full((EXPERTS,), 1e-9)
    one[3] = 1.0
    return {"uniform": torch.ones(EXPERTS), "Zipf": 1 / torch.arange(1.0, EXPERTS + 1), "all to one": one}


def choose(popularity: Tensor, x_BTD: Tensor) -> Choice:
    """Draw TOP_K experts per token by popularity, all distinct unless one expert takes all tokens."""
    tokens = x_BTD.shape[0] * x_BTD.shape[1]
    several = bool((popularity > 1e-6).sum() >= TOP_K)
    chosen_NK = torch.multinomial(popularity.expand(tokens, -1), TOP_K, replacement=not several)
    weights_NK = torch.rand(tokens, TOP_K) + 0.1
    return weights_NK.to(x_BTD.device), chosen_NK.to(x_BTD.device)


def step(block: torch.nn.Module, x_BTD: Tensor, choice: Choice | None = None) -> None:
    """Run one forward and backward pass. choice: replaces the router's output after it has computed it."""
    hook = None
    if choice is not None:
        hook = block.router.register_forward_hook(lambda _module, _x, out: (choice[0] + 0 * out[0], choice[1], out[2]))
    leaf = x_BTD.detach().requires_grad_()
    out = block(leaf)
    y_BTD, extra = out if isinstance(out, tuple) else (out, None)
    torch.autograd.backward([y_BTD] if extra is None else [y_BTD, extra.sum()], [x_BTD] if extra is None else [x_BTD, None])
    block.zero_grad(set_to_none=True)
    if hook is not None:
        hook.remove()


@torch.no_grad()
def dropped(moe: MixtureOfExperts, x_BTD: Tensor, choice: Choice) -> int:
    """Count tokens with an output other than the weighted sum of their experts, each computed separately on all tokens."""
    weights_NK, chosen_NK = choice
    hook = moe.router.register_forward_hook(lambda _module, _x, out: (*choice, out[2]))
    output_ND = moe(x_BTD)[0].flatten(0, 1).float()
    hook.remove()
    x_ND, experts = x_BTD.flatten(0, 1), moe.experts
    expected_ND = torch.zeros_like(output_ND)
    for e in range(EXPERTS):
        y_ND = F.linear(F.silu(F.linear(x_ND, experts.gate_proj[e])) * F.linear(x_ND, experts.up_proj[e]), experts.down_proj[e])
        expected_ND += y_ND.float() * (weights_NK * (chosen_NK == e)).sum(dim=1, keepdim=True)
    tolerance = 1e-4 if x_BTD.dtype == torch.float32 else 3e-2
    return int(((output_ND - expected_ND).norm(dim=1) > tolerance * expected_ND.norm(dim=1)).sum())


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return each step's seconds by each clock."""
    clocks = {"wall": time.perf_counter} | ({} if torch.cuda.is_available() else {"CPU": time.process_time})
    spent: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in clocks} for name in steps}
    for repeat in range(repeats + 2):  # two to warm up
        for name, run in steps.items():
            wait()
            starts = {clock: now() for clock, now in clocks.items()}
            run()
            wait()
            if repeat >= 2:
                for clock, now in clocks.items():
                    spent[name][clock].append(now() - starts[clock])
    return spent


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
