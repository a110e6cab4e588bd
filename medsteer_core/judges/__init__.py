"""What looks at images and says what they show, and how one is trained."""
