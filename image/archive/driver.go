package archive

// DriverProgram is where the driver's image has the driver.
const DriverProgram = "usr/local/bin/csi-imgdisk"

// Driver is the driver's image, of layers one of which has DriverProgram.
func Driver(name string, layers ...Layer) Image {
	return Image{
		Names: []string{name}, Layers: layers,
		Entrypoint: []string{"/" + DriverProgram},
		Env:        []string{DefaultPath},
		Labels: map[string]string{
			"org.opencontainers.image.title": "csi-imgdisk", "org.opencontainers.image.licenses": "Apache-2.0",
			"org.opencontainers.image.source": "https://github.com/csi-imgdisk/csi-imgdisk",
		},
	}
}

// DefaultPath is the environment variable PATH of images that have Debian's directories.
const DefaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
