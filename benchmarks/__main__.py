"""vit_triton against PyTorch and others in speed and memory, and what GPU compilers make of its kernels."""

import argparse

from benchmarks import codegen, compare, growth, memory, overhead

COMMANDS = {
    "ops": compare,
    "models": compare,
    "growth": growth,
    "memory": memory,
    "overhead": overhead,
    "codegen": codegen,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="|".join(COMMANDS))
    for name, module in COMMANDS.items():
        summary = module.SUMMARY[name]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    options = parser.parse_args()
    COMMANDS[options.what].run(options)


if __name__ == "__main__":
    main()
