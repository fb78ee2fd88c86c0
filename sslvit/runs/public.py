"""Text for others: records without secrets, and descriptions of a model without local paths, as plain Markdown."""

import re

MASK = "***"
URL = re.compile(r"([A-Za-z][\w+.-]*://)(?:\S*@)?([^\s?#]*)([?#]\S*)?")
QUERY = re.compile(r"\?[\w.%-]+=\S*")  # without a scheme, as in hf:name?token=...; a ? alone is a glob's
SECRET = re.compile(
    r"(?i)(?<!\w)((?:[a-z]+[_-])?(?:token|secret|password|passwd|signature|credential|api_?key|access_?key)=)[^\s&,;]+"
)
OURS = re.compile(r"(?i)(class|mask|reg|distillation|cls)_token=")  # options of recipes and models
TOKEN = re.compile(r"(?<!\w)hf_\w{8,}")  # the Hub's
LOCAL = "folder|list|csv|idx|npz|disk|parquet|webdataset"  # kinds of --data, of which sources make their names
SOURCE = re.compile(rf"((?:{LOCAL}):)(.*?)((?: \([^()]*\))*)", re.DOTALL)
PATH = re.compile(r"""(?<![\w./*~-])(?:~|[A-Za-z]:)?[/\\][^\s/\\"'`<>|,;]+(?:[/\\][^\s"'`<>|,;)]*)?""")
MARKUP = re.compile(  # only characters that would become markup, e.g. a bracket that would begin a link's address
    r"[\\`|<~#$]|(?<=\S)\*|\*(?=\S)|(?<!\w)_(?=\S)|(?<=\S)_(?!\w)|(?<=\])[(\[:]|&(?=#?\w+;)|^>|^[+*-](?= )"
)


def without_secrets(text: str) -> str:
    """A URL's user, password, query and fragment, and the values of what is named a token, key or password."""
    text = URL.sub(lambda url: url[1] + url[2] + (f"?{MASK}" if url[3] else ""), text)
    text = QUERY.sub(f"?{MASK}", text)
    text = SECRET.sub(lambda pair: pair[0] if OURS.fullmatch(pair[1]) else pair[1] + MASK, text)
    return TOKEN.sub(MASK, text)


def public(text: str) -> str:
    """Without secrets, and local paths shortened to their last name: folder:/home/me/flowers is folder:flowers."""
    text = without_secrets(text.replace("file://", "")).replace(f"?{MASK}", "")
    if source := SOURCE.fullmatch(text):  # its paths may have spaces, unlike those in other text
        kind, path, notes = source.groups()
        paths = path.split(",") if kind in ("folder:", "list:", "csv:") else [path]
        return kind + ",".join(map(last_name, paths)) + notes
    return PATH.sub(lambda path: last_name(path[0]), text)


def last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def markdown(text: str) -> str:
    """In one line that Markdown, in a table too, shows as it is: names of classes and datasets can be anything."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
