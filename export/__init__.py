"""From a trained CNN to files that can be deployed, with every BatchNorm folded into its neighbours."""
