"""A packed model as a Core ML package (`.mlpackage`), with our indices and our tables in it, checked.

Read: architecture (what fits), weights (our tensors as constants), program (the model in Core ML's language), export; then what checks
it: stored, arithmetic, check. coremltools and transformers are imported when `export.export` is called. Writing and checking work on
Linux and macOS; only Core ML itself, which Apple's systems have, can say that a device runs the package and how fast.
"""
