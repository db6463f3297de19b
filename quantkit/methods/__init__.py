"""Methods: how codes are chosen. Tensors in, tensors out; nothing here touches files."""
