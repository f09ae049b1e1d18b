package main

import (
	"bufio"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// component is something that the image has: a Debian package or a Go module.
type component struct {
	name, version string
	purl          string // https://github.com/package-url/purl-spec
}

// writeBOM writes the image's bill of materials.
func writeBOM(b build, epoch time.Time, path string) error {
	debian, err := debianPackages(filepath.Join(b.rootfs, "var/lib/dpkg/status"))
	if err != nil {
		return err
	}
	modules, err := goModules(b.binary)
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(document(b, epoch, append(debian, modules...)), "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// document is an SPDX 2.3 document.
func document(b build, epoch time.Time, parts []component) map[string]any {
	const rootID = "SPDXRef-image"
	packages := []map[string]any{{
		"SPDXID": rootID, "name": b.name, "downloadLocation": "NOASSERTION", "filesAnalyzed": false,
		"licenseConcluded": "NOASSERTION", "licenseDeclared": "Apache-2.0", "copyrightText": "NOASSERTION",
	}}
	relations := []map[string]string{{
		"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": rootID,
	}}
	whole := sha256.New()
	for i, c := range parts {
		id := fmt.Sprintf("SPDXRef-%d", i)
		packages = append(packages, map[string]any{
			"SPDXID": id, "name": c.name, "versionInfo": c.version, "downloadLocation": "NOASSERTION", "filesAnalyzed": false,
			"licenseConcluded": "NOASSERTION", "licenseDeclared": "NOASSERTION", "copyrightText": "NOASSERTION",
			"externalRefs": []map[string]string{{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": c.purl}},
		})
		relations = append(relations, map[string]string{
			"spdxElementId": rootID, "relationshipType": "CONTAINS", "relatedSpdxElement": id,
		})
		fmt.Fprintln(whole, c.purl)
	}
	return map[string]any{
		"spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT", "name": b.name,
		"documentNamespace": "https://github.com/csi-imgdisk/csi-imgdisk/sbom/" + hex.EncodeToString(whole.Sum(nil)),
		"creationInfo":      map[string]any{"created": epoch.Format(time.RFC3339), "creators": []string{"Tool: csi-imgdisk/image"}},
		"packages":          packages, "relationships": relations,
	}
}

// debianPackages reads dpkg's database: paragraphs of "Field: value", parted by empty
// lines.
func debianPackages(status string) (list []component, err error) {
	f, err := os.Open(status)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fields := map[string]string{}
	finish := func() {
		if strings.HasSuffix(fields["Status"], " installed") {
			name, version, arch := fields["Package"], fields["Version"], fields["Architecture"]
			list = append(list, component{name, version, fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", name, version, arch)})
		}
		clear(fields)
	}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if line == "" {
			finish()
		} else if name, value, ok := strings.Cut(line, ": "); ok && line[0] != ' ' {
			fields[name] = value
		}
	}
	finish()
	if len(list) == 0 && lines.Err() == nil {
		return nil, errors.New("dpkg's database has no package")
	}
	return list, lines.Err()
}

// goModules reads what the linker wrote into a program.
func goModules(binary string) (list []component, err error) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	list = append(list, component{"go", info.GoVersion, "pkg:golang/stdlib@" + strings.TrimPrefix(info.GoVersion, "go")})
	list = append(list, component{info.Main.Path, info.Main.Version, "pkg:golang/" + info.Main.Path + "@" + info.Main.Version})
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		list = append(list, component{m.Path, m.Version, "pkg:golang/" + m.Path + "@" + m.Version})
	}
	return list, nil
}
