"""Reviews of referred images: their queue, what a reader may see, pictures, answers."""
