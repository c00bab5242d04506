"""JSON of strangers."""

import pytest

from mora_jax._text.json_reader import read_json, read_json_file

REFUSED = {
    '{"r": 8, "r": 9}': "'r' occurs twice",
    '{"a": {"b": 1, "b": 1}}': "'b' occurs twice",
    "[NaN]": "NaN is not a number",
    "[-Infinity]": "-Infinity is not a number",
    "[1e999]": "1e999 is too large",
    "[" * 100_000: "nests too deeply",
    '{"a":' * 100_000: "nests too deeply",
    "[" + "1" * 5000 + "]": "4300",
    "[" + "0," * 2**20 + "0]": "more than 1,048,576 values",
    " " * (2**23 + 1): "more than 8,388,608 characters",
    "": "Expecting value",
    "{": "Expecting",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_json_lacks_is_refused(text):
    with pytest.raises(ValueError, match=REFUSED[text]):
        read_json(text)


def test_values_are_those_of_the_text():
    text = '{"a": [1, 2.5, null, true, "x"], "b": {"": -1e3}}'
    assert read_json(text) == {"a": [1, 2.5, None, True, "x"], "b": {"": -1000.0}}


def test_no_more_of_a_file_is_read_than_may_be_in_it(tmp_path):
    file = tmp_path / "a.json"
    with file.open("wb") as opened:
        opened.truncate(2**40)  # of no size on disk
    with pytest.raises(ValueError, match=r"a\.json is not JSON.*more than 2,097,152 characters"):
        read_json_file(file)
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.json is not JSON.*utf-8"):
        read_json_file(file)
