"""Extracts the members of a zip archive below a prefix; ends with status 9 where the archive is
damaged.

python unzip_members.py ARCHIVE PREFIX FOLDER
"""

import shutil
import sys
import zipfile

archive, prefix, folder = sys.argv[1:]
try:
    with zipfile.ZipFile(
        archive
    ) as file:  # never writes outside the folder, and checks every member's checksum
        members = [name for name in file.namelist() if name.startswith(prefix)]
        if not members:
            sys.exit(f"error: {archive}: holds no {prefix}")
        size = sum(file.getinfo(name).file_size for name in members)
        free = shutil.disk_usage(folder).free
        if size > free:
            sys.exit(
                f"error: {archive}: refused, nothing was extracted: it would take "
                f"{size / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
            )
        file.extractall(folder, members)
except OSError as error:
    sys.exit(
        f"error: {archive}: could not be extracted into {folder} ({error.strerror}); run the "
        f"same command again to go on"
    )
except (
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    __import__("zlib").error,
):
    sys.exit(9)
