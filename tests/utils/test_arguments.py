import pytest

from theia.utils.arguments import comma_list


@pytest.mark.parametrize("value", ["clip,dinov2", " clip , dinov2,", ["clip", "dinov2"]])
def test_lists_are_comma_separated_or_lists(value: str | list[str]) -> None:
    assert comma_list(value) == ["clip", "dinov2"]
