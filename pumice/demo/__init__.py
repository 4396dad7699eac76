"""The demo network: trained weights and images, see README.md in this folder."""
