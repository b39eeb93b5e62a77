"""Python side of the native core: tensors become pointers, workspace is allocated here."""
