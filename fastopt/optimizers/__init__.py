"""One public class a file."""
