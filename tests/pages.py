"""Pages of reports, taken apart, and runs that leave them."""

import base64
import json
import re
import xml.etree.ElementTree as ElementTree

RECORDS = [{"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))} for i in range(4, 40)]


def arguments(tiny_dir, places, out, *more):
    return ["compress", str(tiny_dir), "--data", str(places / "train.json"), "--out", str(out), "--block-tokens", "64", *more]


def change(directory, name, spoil):
    """Change a JSON file of a directory in place."""
    content = json.loads((directory / name).read_text())
    spoil(content)
    (directory / name).write_text(json.dumps(content))


def words_of(html):
    """The text of a page, one piece a line."""
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"<[^>]+>", "\n", re.sub(r"<style>.*?</style>", "", html, flags=re.S)))


def pictures_of(html):
    """The words of every picture, which must be whole XML."""
    found = [ElementTree.fromstring(base64.b64decode(data)) for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', html)]
    return [" ".join(element.text or "" for element in picture.iter() if element.tag.endswith("text")) for picture in found]
