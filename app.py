"""The studio, for a person and for a Space: `python app.py`, then open http://127.0.0.1:7860."""

import argparse
import importlib.util
import os


# ZeroGPU patches torch when `spaces` is imported, so that comes before anything that imports torch.
if importlib.util.find_spec("spaces"):
    importlib.import_module("spaces")

from ardiff.cli.hosting import add_demo_options, run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the studio: watch every frame of a video clear up.")
    add_demo_options(
        parser,
        host="0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1",
        port=int(os.environ.get("GRADIO_SERVER_PORT") or os.environ.get("PORT") or 7860),
    )
    run_demo(parser.parse_args())


if __name__ == "__main__":
    main()
