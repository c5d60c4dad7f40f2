"""What the Hub keeps of a repo: contents by their hash, commits of files, branches and tags."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch

MAIN = "main"
_LFS_PATTERNS = """
7z arrow bin bz2 ckpt ftz gz h5 joblib lfs.* mlmodel model msgpack npy npz onnx ot parquet pb
pickle pkl pt pth rar safetensors tar.* tar tflite tgz wasm xz zip zst
"""
GITATTRIBUTES = "".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in _LFS_PATTERNS.split()
).encode()
"""What the Hub puts into every new model repo; its own also names ``saved_model`` and tfevents."""
_LFS_FROM = 10 * 1024 * 1024  # bytes: the Hub takes no larger file into git itself


def git_oid(content: bytes) -> str:
    """The hash that git names this content by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git keeps in the place of a large file."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
        sha256.encode(),
        size,
    )


@dataclass(frozen=True)
class Entry:
    """A file of a commit, as it was declared.

    Attributes:
        oid: Hash of what git keeps, which for a large file is its pointer.
        size: Of the content, in bytes.
        sha256: Of the content; None for a file that git keeps itself.
    """

    oid: str
    size: int
    sha256: str | None = None

    @property
    def key(self) -> str:
        """The name of the content among the repo's blobs, and the file's ETag."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A state of a repo's files.

    Attributes:
        oid: 40 hexadecimal digits, from the files, the message and the parent.
        parent: Its parent's oid; empty for the first commit.
        message: First line.
        description: What follows it.
        author: User who made it.
        date: When it was made.
        tree: Path to file.
        blobs: Where the repo keeps the contents.
    """

    oid: str
    parent: str
    message: str
    description: str
    author: str
    date: datetime
    tree: Mapping[str, Entry]
    blobs: Mapping[str, bytes] = field(repr=False)

    @property
    def files(self) -> dict[str, bytes]:
        """Path to content, as a download would bring it."""
        return {path: self.blobs[entry.key] for path, entry in sorted(self.tree.items())}


@dataclass
class Repo:
    """A repo of a model or a data set; a new one has one commit, as on the Hub.

    Attributes:
        repo_id: ``user/name``.
        private: Whether only its owner may read it.
        gated: Whether nobody may read it who is not logged in.
        blobs: Contents by hash: a git oid, or the sha256 of a large file.
        commits: All commits by oid, oldest first.
        branches: Name to oid.
        tags: Name to oid.
    """

    repo_id: str
    private: bool = False
    gated: bool = False
    blobs: dict[str, bytes] = field(default_factory=dict, repr=False)
    commits: dict[str, Commit] = field(default_factory=dict, repr=False)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        entry = self.keep(GITATTRIBUTES)
        self.commit(MAIN, {".gitattributes": entry}, "initial commit", author="system")

    @property
    def owner(self) -> str:
        """The user whose repo it is."""
        return self.repo_id.split("/")[0]

    def keep(self, content: bytes) -> Entry:
        """Keep the content of a file in git itself."""
        entry = Entry(git_oid(content), len(content))
        self.blobs[entry.key] = content
        return entry

    def kept(self, sha256: str) -> Entry:
        """A large file whose content was uploaded before."""
        size = len(self.blobs[sha256])
        return Entry(git_oid(lfs_pointer(sha256, size)), size, sha256)

    def commit(
        self,
        branch: str,
        tree: Mapping[str, Entry],
        message: str,
        description: str = "",
        author: str = "",
    ) -> Commit:
        """Add a commit at the end of a branch."""
        parent = self.branches.get(branch, "")
        content = [parent, message, description]
        content += [f"{path}\0{entry.key}" for path, entry in sorted(tree.items())]
        oid = hashlib.sha1("\n".join(content).encode()).hexdigest()
        now = datetime.now(UTC)
        self.commits[oid] = Commit(
            oid, parent, message, description, author or self.owner, now, dict(tree), self.blobs
        )
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, or the whole or the start of an oid names.

        Raises:
            KeyError: There is none.
        """
        for oids in (self.branches, self.tags):
            if revision in oids:
                return self.commits[oids[revision]]
        found = [oid for oid in self.commits if len(revision) >= 5 and oid.startswith(revision)]
        if len(found) != 1:
            raise KeyError(revision)
        return self.commits[found[0]]

    def history(self, revision: str) -> list[Commit]:
        """The commits up to this one, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def files(self, revision: str = MAIN) -> dict[str, bytes]:
        """Path to content, as a download would bring it."""
        return self.at(revision).files

    def goes_to_lfs(self, path: str, size: int, sample: bytes, revision: str) -> bool:
        """Whether a file is to be uploaded by itself: by its name, its size, or as it is binary."""
        attributes = self.files(revision).get(".gitattributes", b"").decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        return size > _LFS_FROM or b"\0" in sample or _matches(path, patterns)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    name = path.rsplit("/", 1)[-1]
    return any(fnmatch(path if "/" in pattern else name, pattern) for pattern in patterns)
