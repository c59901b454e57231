#!/bin/sh
# The rig in Python, with the first Python that has cffi.
cd "$(dirname "$0")/../.." || exit 1
for python in python3 /usr/bin/python3; do
    if "$python" -c 'import cffi' 2>/dev/null; then
        exec "$python" examples/rig.py
    fi
done
echo 'SKIP: rig needs cffi (apt install python3-cffi)'
