"""From a name to batches on the devices: sources, order, loader, preprocessing, augmentation."""
