package auth

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// ReadSecret reads the secret for tokens from a file: its text, without white space around it.
func ReadSecret(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("the secret for tokens cannot be read: %w", err)
	}
	b = bytes.TrimSpace(b)
	if len(b) < MinSecretBytes {
		return nil, fmt.Errorf("the secret for tokens in %s has %d bytes; HS256 needs at least %d", path, len(b), MinSecretBytes)
	}
	return b, nil
}

// LoadOrCreateSecret reads the secret, or makes one where the file is not there: 32 random bytes in hexadecimal, in a file that only its owner may read. It may be called by several
// processes at once: all get the same secret.
func LoadOrCreateSecret(path string) ([]byte, error) {
	secret, err := ReadSecret(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return secret, err
	}
	var random [32]byte
	rand.Read(random[:]) // never fails: crypto/rand ends the process instead
	text := hex.EncodeToString(random[:]) + "\n"

	// The file appears with its content or not at all, and never replaces one that another process made: written beside, then linked.
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*") // mode 0600
	if err != nil {
		return nil, fmt.Errorf("the secret for tokens cannot be made: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Link(f.Name(), path)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("the secret for tokens cannot be made: %w", err)
	}
	return ReadSecret(path)
}
