"""Beyond one label an image: boxes and masks from prompted feature maps of a frozen backbone."""
