#!/usr/bin/env bash
# Makes the Debian package, from the same metadata as `cargo deb` ([package.metadata.deb] in Cargo.toml) and
# without having to build that first. Prints the path of the package.
#
#   etc/package.sh [--binary PROGRAM] [--out FOLDER]
#
# PROGRAM: what to pack; without it the release build is made first. FOLDER: default target/debian.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. etc/servers.sh

binary='' out=target/debian
while [ $# -gt 0 ]; do
    case $1 in
        --binary) binary=${2:?--binary needs a program}; shift 2 ;;
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        *) die "unknown argument $1; see the beginning of $0" ;;
    esac
done
command -v python3 > /dev/null || die "python3 not found; install it: apt-get install python3"
command -v dpkg-deb > /dev/null || die "dpkg-deb not found: packages are made on Debian and what descends from it"

if [ -z "$binary" ]; then
    need_cargo
    cargo build --release --locked --bin pg-outbox >&2
    binary=${CARGO_TARGET_DIR:-target}/release/pg-outbox
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$binary" generate "$work/generated"
strip --strip-unneeded -o "$work/pg-outbox" "$binary" || die "strip failed; install it: apt-get install binutils"
binary=$work/pg-outbox

# The lowest glibc that has every symbol the program wants.
glibc=$(grep -ao 'GLIBC_2\.[0-9]*' "$binary" | sort -uV | tail -n 1)
architecture=$(dpkg --print-architecture)
python3 - "$binary" "$work" "${glibc#GLIBC_}" "$architecture" << 'PYTHON'
import glob, gzip, os, pathlib, shutil, sys, tomllib

binary, work, glibc, architecture = sys.argv[1:]
root = pathlib.Path(work, "root")
package = tomllib.load(open("Cargo.toml", "rb"))["package"]
deb = package["metadata"]["deb"]

# What the metadata calls target/... is what was built and generated for this package.
def source(pattern):
    if pattern == "target/release/pg-outbox":
        return [binary]
    found = glob.glob(pattern.replace("target/generated/", f"{work}/generated/"))
    return sorted(found) or sys.exit(f"no file is {pattern}, which Cargo.toml lists for the package")

size = 0
for pattern, target, mode in deb["assets"]:
    for file in source(pattern):
        name = target + os.path.basename(file) if target.endswith("/") else target
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # As policy wants it: manual pages and changelogs are compressed, without a time in them.
        if name.startswith("usr/share/man/"):
            path = path.with_name(path.name + ".gz")
            path.write_bytes(gzip.compress(pathlib.Path(file).read_bytes(), 9, mtime=0))
        else:
            shutil.copyfile(file, path)
        path.chmod(int(mode, 8))
        size += path.stat().st_size

control = root / "DEBIAN"
control.mkdir(parents=True)
version = f"{package['version']}-{deb['revision']}"
pathlib.Path(work, "name").write_text(f"{package['name']}_{version}_{architecture}.deb")
depends = deb["depends"].replace("$auto", f"libc6 (>= {glibc}), libgcc-s1")
description = "".join(f" {line}\n" if line else " .\n" for line in deb["extended-description"].strip().splitlines())
(control / "control").write_text(
    f"Package: {package['name']}\nVersion: {version}\nArchitecture: {architecture}\n"
    f"Maintainer: {deb['maintainer']}\nInstalled-Size: {size // 1024 + 1}\nDepends: {depends}\n"
    f"Suggests: {deb['suggests']}\nSection: {deb['section']}\nPriority: {deb['priority']}\n"
    f"Description: {package['description']}\n{description}"
)
(control / "conffiles").write_text("".join(f"{file}\n" for file in deb["conf-files"]))
for script in sorted(pathlib.Path(deb["maintainer-scripts"]).iterdir()):
    shutil.copyfile(script, control / script.name)
    (control / script.name).chmod(0o755)
for folder, _, _ in os.walk(root):
    os.chmod(folder, 0o755)
PYTHON

mkdir -p "$out"
package=$out/$(cat "$work/name")
dpkg-deb --root-owner-group --build "$work/root" "$package" >&2
printf '%s\n' "$package"
