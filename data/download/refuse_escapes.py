"""Refuses an archive whose members would be written, or would point, outside of the target, or
would fill the disk.

python refuse_escapes.py LISTING ARCHIVE SEVEN ROOT      # LISTING: what `7z l -slt` printed
"""

import re
import shutil
import subprocess
import sys

listing, archive, seven, root = sys.argv[1:]


def refuse(member, reason):
    sys.exit(f"error: {archive}: refused, nothing was extracted: member {member!r} {reason}")


def leaves(path):
    return re.match(r"[\\/]|[A-Za-z]:", path) or ".." in re.split(r"[\\/]", path)


def link_target(fields):
    command = [seven, "e", "-so", "-spd", "-p-", "--", archive, fields["Path"]]
    content = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stdout
    return fields.get("Symbolic Link") or content.decode(errors="replace")


text = open(listing, encoding="utf-8", errors="surrogateescape", newline="\n").read()
header, rule, members = text.partition("\n----------\n")
if not rule:
    sys.exit(f"error: {archive}: refused, nothing was extracted: {seven} lists no members")
size, free = 0, shutil.disk_usage(root).free
for block in filter(None, members.strip("\n").split("\n\n")):
    lines = [line.partition(" =") for line in block.strip("\n").split("\n")]
    fields = {name: value.strip(" ") for name, _, value in lines}
    if lines[0][0] != "Path" or len(fields) != len(lines) or not all(mark for _, mark, _ in lines):
        refuse(lines[0][2], "has a name of more than one line")
    if leaves(fields["Path"]):
        refuse(fields["Path"], "would leave the target")
    if fields.get("Hard Link"):
        refuse(fields["Path"], "is a hard link")
    if "l" in fields.get("Attributes", "").lower() and int(fields.get("Size") or 0) > 4096:
        refuse(fields["Path"], "is a link whose target is no path")
    if "l" in fields.get("Attributes", "").lower() and leaves(
        target := link_target(fields) or ".."
    ):
        refuse(fields["Path"], f"is a link that points out of its folder, to {target!r}")
    size += int(fields.get("Size") or 0)
    if size > free:
        refuse(
            fields["Path"],
            f"and those before it would take {size / 1e9:.1f} GB; {free / 1e9:.1f} GB are free",
        )
