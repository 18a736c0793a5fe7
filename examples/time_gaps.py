"""How long a clip takes at different timestep gaps: total, first new frame, and the work that was done.

    python examples/time_gaps.py --threads 2

The gaps take turns, so that a busy moment of the machine does not hit one of them alone. Prints medians with the fastest
and slowest round, and one JSON line last.
"""

import argparse
import json
import statistics
import time

import torch

from ardiff import ARDiffPipeline, bundled_model


def measure(pipe: ARDiffPipeline, arguments: dict) -> dict[str, float]:
    """One run: seconds to the first new frame and in all, decoding included, and frame evaluations."""
    start = time.perf_counter()
    first_frame, evaluations = None, 0
    for step in pipe.stream(generator=torch.Generator("cpu").manual_seed(0), **arguments):
        evaluations += step.frame_evaluations
        if step.finished and first_frame is None:
            first_frame = time.perf_counter() - start
    total = time.perf_counter() - start
    return {"calls": step.num_iterations, "evaluations": evaluations, "first_frame_s": first_frame, "total_s": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="pipeline folder (default: the bundled model)")
    parser.add_argument("--gaps", type=int, nargs="+", default=[0, 5, 50], help="timestep gaps to compare")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0, help="1 halves the work")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    pipe = ARDiffPipeline.from_pretrained(args.model or bundled_model(), dtype=torch.float32)
    shared = {"num_frames": args.num_frames, "num_inference_steps": args.steps, "guidance_scale": args.guidance}
    shared["class_labels"] = [pipe.class_names[0]] if pipe.class_names else None
    measure(pipe, shared | {"ar_step": args.gaps[-1], "num_inference_steps": args.gaps[-1] or 1})  # warm up
    rounds = [{gap: measure(pipe, shared | {"ar_step": gap}) for gap in args.gaps} for _ in range(args.rounds)]

    print(
        f"{args.num_frames} frames, {args.steps} steps, guidance {args.guidance}, {args.threads} threads, median (min..max)"
    )
    report = {}
    for gap in args.gaps:
        runs = [measured[gap] for measured in rounds]
        cells = []
        for name in ("first_frame_s", "total_s"):
            values = [run[name] for run in runs]
            cells.append(f"{statistics.median(values):6.2f} s ({min(values):.2f}..{max(values):.2f})")
        report[gap] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        calls, evaluations = runs[0]["calls"], runs[0]["evaluations"]
        print(
            f"gap {gap:3d}: {calls:4d} calls, {evaluations:5d} frame evaluations, first frame {cells[0]}, total {cells[1]}"
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
