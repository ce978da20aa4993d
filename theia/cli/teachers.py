"""``theia teachers``: lists the installed teachers."""

from tabulate import tabulate

from theia.cli.parser import Parser


def main(argv: list[str]) -> int:
    """Prints the installed teachers, and below them those that cannot be used.

    Args:
        argv: Arguments after the command.

    Returns:
        Exit status.
    """
    parser = Parser(prog="theia teachers", description="List the installed teachers and what they give.")
    parser.parse_args(argv)

    from theia import registry  # imports torch; --help does not need it

    found, broken = registry.find_all()
    rows = [
        (
            name,
            teacher.spec.channels,
            "{}x{}".format(*teacher.spec.grid_hw),
            "yes" if teacher.spec.has_cls else "no",
            teacher.spec.weights,
            teacher.spec.licence,
        )
        for name, teacher in found.items()
    ]
    lines = [tabulate(rows, ("name", "channels", "grid", "CLS", "weights", "licence"), disable_numparse=[0, 2, 4, 5])]
    if broken:
        lines += ["", "Cannot be used:", *(f"  {error}" for error in broken.values())]
    print("\n".join(lines))
    return 0
