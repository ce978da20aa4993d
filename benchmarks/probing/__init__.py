"""What a frozen encoder's features tell: classes of images, and depth, normals, classes and matches of their pixels."""
