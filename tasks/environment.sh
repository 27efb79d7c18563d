# Makes the environment .venv at the root, once, and again where pyproject.toml has changed. To be sourced at the root.
if ! cmp -s pyproject.toml .venv/installed-from.toml; then
    echo "Making the environment .venv (needs python3 with venv and pip; torch is large, this takes minutes once) ..." >&2
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[tested]"
    cp pyproject.toml .venv/installed-from.toml
fi
export PATH="$PWD/.venv/bin:$PATH"
