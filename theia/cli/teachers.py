"""``theia teachers``: lists the installed teachers."""

from tabulate import tabulate


def teachers() -> int:
    """List the installed teachers and what they give."""
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
