"""Text for others: records without secrets, and what is told of a model without local paths, as plain Markdown."""

import re

MASK = "***"
URL = re.compile(r"([A-Za-z][\w+.-]*://)(?:\S*@)?([^\s?#]*)([?#]\S*)?")
QUERY = re.compile(r"\?[\w.%-]+=\S*")  # of what has no scheme, as hf:name?token=...; a ? alone is a glob's
SECRET = re.compile(
    r"(?i)(?<!\w)((?:[a-z]+[_-])?(?:token|secret|password|passwd|signature|credential|api_?key|access_?key)=)[^\s&,;]+"
)
OURS = re.compile(r"(?i)(class|mask|reg|distillation|cls)_token=")  # options of recipes and models
TOKEN = re.compile(r"(?<!\w)hf_\w{8,}")  # the Hub's
LOCAL = "folder|list|csv|idx|npz|disk|parquet|webdataset"  # kinds of --data, of which sources make their names
SOURCE = re.compile(rf"((?:{LOCAL}):)(.*?)((?: \([^()]*\))*)", re.DOTALL)
PATH = re.compile(r"""(?<![\w./*~-])(?:~|[A-Za-z]:)?[/\\][^\s/\\"'`<>|,;]+(?:[/\\][^\s"'`<>|,;)]*)?""")
MARKUP = re.compile(  # only what would become markup, e.g. a bracket where it would begin a link's address
    r"[\\`|<~#$]|(?<=\S)\*|\*(?=\S)|(?<!\w)_(?=\S)|(?<=\S)_(?!\w)|(?<=\])[(\[:]|&(?=#?\w+;)|^>|^[+*-](?= )"
)


def without_secrets(text: str) -> str:
    """A URL's user, password, query and fragment, and the values of what is named a token, key or password."""
    text = URL.sub(lambda found: found[1] + found[2] + (f"?{MASK}" if found[3] else ""), text)
    text = QUERY.sub(f"?{MASK}", text)
    text = SECRET.sub(lambda found: found[0] if OURS.fullmatch(found[1]) else found[1] + MASK, text)
    return TOKEN.sub(MASK, text)


def public(text: str) -> str:
    """Without these, and of local paths with the last name alone: folder:/home/me/flowers is folder:flowers."""
    text = without_secrets(text.replace("file://", "")).replace(f"?{MASK}", "")
    if found := SOURCE.fullmatch(text):  # its paths may have spaces, unlike those that are found in other text
        paths = found[2].split(",") if found[1] in ("folder:", "list:", "csv:") else [found[2]]
        return found[1] + ",".join(map(last_name, paths)) + found[3]
    return PATH.sub(lambda path: last_name(path[0]), text)


def last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def markdown(text: str) -> str:
    """In one line that Markdown, a table of it too, shows as it is: names of classes and data sets are anybody's."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
