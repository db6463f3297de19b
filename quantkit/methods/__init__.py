"""How codes are chosen: one method a file. Tensors in, tensors out; nothing here touches files."""
