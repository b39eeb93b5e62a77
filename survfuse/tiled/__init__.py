"""Plain torch over tiles of the bag: O(tile) memory, own backward, torch's own products."""
