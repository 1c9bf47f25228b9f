"""Make a container image without a registry or a daemon, from the standard library alone.

    image.py OUT.tar NAME:TAG [--user UID] [--folder DIR] [--env NAME=VALUE]…
      (ROOTFS.tar|DIR|FILE…|--skeleton) [-- ENTRYPOINT…]

ROOTFS.tar becomes the only layer as it is; of DIR, its tree; each FILE lies in / under its own
name. --skeleton: an empty Debian-shaped tree (links, folders) for containers that see the host's
/usr. What it writes is a docker-archive: KubeLab(images=[…]) and `podman load` take it.
"""

import hashlib
import io
import json
import os
import sys
import tarfile

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USERS = """\
root:x:0:0::/root:/bin/sh
relay:x:1000:1000::/home/relay:/bin/sh
nobody:x:65534:65534::/:/bin/false
"""
FOLDERS = "usr etc root home opt srv mnt proc sys dev run var var/lib var/log var/cache etc/ssl"


def add(tar, name, data=None, link=None, mode=0o755, uid=0) -> None:
    """Add a file of these bytes, a symbolic link, or a folder."""
    entry = tarfile.TarInfo(name)
    entry.mode, entry.uid, entry.gid = mode, uid, uid
    if link:
        entry.type, entry.linkname = tarfile.SYMTYPE, link
    elif data is None:
        entry.type = tarfile.DIRTYPE
    else:
        entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data or b""))


def skeleton(tar) -> None:
    """Add the tree into which the host's /usr is mounted, and three users."""
    for folder in [*FOLDERS.split(), "etc/alternatives"]:
        add(tar, folder)
    for folder in ("tmp", "var/tmp"):
        add(tar, folder, mode=0o1777)
    add(tar, "home/relay", uid=1000)
    for folder in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink("/" + folder):  # a merged /usr, as on Debian since 12
            add(tar, folder, link="usr/" + folder)
    add(tar, "etc/passwd", USERS.encode(), mode=0o644)
    add(tar, "etc/group", b"root:x:0:\nrelay:x:1000:\nnogroup:x:65534:\n", mode=0o644)
    add(tar, "etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files dns\n", mode=0o644)


def root_owns(entry):
    """Give an entry to root, whoever made the image."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def write_layer(out: str, sources: list[str]) -> str:
    """Write the one layer. Returns its path."""
    if len(sources) == 1 and os.path.isfile(sources[0]) and tarfile.is_tarfile(sources[0]):
        return sources[0]
    with tarfile.open(out + ".layer", "w") as tar:
        if sources == ["--skeleton"]:
            skeleton(tar)
        elif len(sources) == 1 and os.path.isdir(sources[0]):
            tar.add(sources[0], arcname=".", filter=root_owns)
        else:
            add(tar, "tmp", mode=0o1777)
            for path in sources:
                with open(path, "rb") as file:
                    add(tar, os.path.basename(path), file.read())
    return out + ".layer"


def main(words: list[str]) -> None:
    """Write the image that these words describe."""
    entrypoint: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, entrypoint = words[:at], words[at + 1 :]
    out, name, *sources = words
    config: dict = {"Entrypoint": entrypoint} if entrypoint else {"Cmd": ["/bin/sh"]}
    environment = {"PATH": PATH}
    while sources[0] in ("--user", "--folder", "--env"):  # runAsNonRoot wants a number of --user
        option, value, *sources = sources
        if option == "--env":
            environment |= [value.split("=", 1)]
        else:
            config["User" if option == "--user" else "WorkingDir"] = value
    config["Env"] = [f"{name}={value}" for name, value in environment.items()]
    layer = write_layer(out, sources)
    with open(layer, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    machine = os.uname().machine
    description = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine),
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest.hexdigest()]},
        "history": [{"created_by": "image.py"}],
    }
    text = json.dumps(description).encode()
    config_name = hashlib.sha256(text).hexdigest() + ".json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(out + ".part", "w") as tar:
        add(tar, config_name, text, mode=0o644)
        add(tar, "manifest.json", json.dumps(manifest).encode(), mode=0o644)
        tar.add(layer, arcname="layer.tar", filter=root_owns)
    os.rename(out + ".part", out)
    if layer == out + ".layer":
        os.unlink(layer)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1:])
