"""Write a packed model as a Core ML package (`.mlpackage`) with its indices and tables as they are, checked.

Read: export (the whole way), program (tracing and conversion), check (the file read back), interpreter (its arithmetic on this machine).
coremltools and transformers are imported when `export.export` is called. Writing and checking work on Linux and macOS; only Core ML
itself, which Apple's systems have, can say that a device runs the package and how fast.
"""
